"""The benchmark: contestants agree, figures mean what they say, and what cannot be measured is a row."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from experiments import benchmark
from experiments.benchmarks import (
    ConvHyperRepresentation,
    ConvMAML,
    ForwardCost,
    LargeUnroll,
    ParameterGrowth,
    ReversibleUnroll,
    SinusoidMAML,
    SmallUnroll,
    TransformerUnroll,
    measure,
    memory,
    timing,
    torchopt_unroll,
    variants,
)
from experiments.benchmarks.agreement import relative_error
from experiments.benchmarks.contestant import Contestant, NotCompiled, NotMeasured, Outcome
from experiments.benchmarks.failure_reasons import is_out_of_memory, reason
from experiments.benchmarks.job import Job
from experiments.benchmarks.memory import MemoryRequest, peak_bytes
from experiments.benchmarks.ours import Ours
from experiments.benchmarks.own_process import in_own_process
from experiments.benchmarks.ratios import measured_ratio
from experiments.benchmarks.row import Row
from experiments.benchmarks.sweep import crossover, growth
from experiments.benchmarks.tables import byte_words, ratio_lines, time_words
from experiments.benchmarks.timing import Rounds, Stopwatch
from experiments.benchmarks.torchopt_unroll import TorchOptMeta
from experiments.benchmarks.work import Target, Work
from hypertorch import tree

CPU = torch.device("cpu")
WORKS: dict[str, Work] = {
    "sinusoid": SinusoidMAML(),
    "small": SmallUnroll(),
    "large": LargeUnroll(),
    "very long": LargeUnroll(num_steps=10_000),
    "transformer": TransformerUnroll(),
    "reversible": ReversibleUnroll(),
    "forward": ForwardCost(),
    "params": ParameterGrowth(),
    "conv maml": ConvMAML(),
    "conv maml strided": ConvMAML(downsample="stride"),
    "conv representation": ConvHyperRepresentation(),
    "conv representation strided": ConvHyperRepresentation(downsample="stride"),
}


def job_of(work: Work, seed: int = 0) -> Job:
    return work.job(seed=seed, device=CPU, dtype=torch.float64)


def is_missing(contestant: Contestant) -> bool:
    return contestant.library == "TorchOpt" and torchopt_unroll.torchopt is None


def test_torchopt_takes_part() -> None:
    if torchopt_unroll.torchopt is None:
        pytest.skip("torchopt is not installed; it comes with the extra `benchmark`")
    assert job_of(SmallUnroll().tiny()).num_steps == 4
    assert TorchOptMeta().run(job_of(SmallUnroll().tiny())).grads is not None


@pytest.mark.parametrize("name", WORKS)
def test_all_contestants_return_the_same_hypergradient(name: str) -> None:
    work = WORKS[name].tiny()
    job = job_of(work)
    before = {key: value.clone() for key, value in [*job.hparams.items(), *job.network.named_parameters()]}
    found: dict[str, dict] = {}
    for key, contestant in work.contestants().items():
        if contestant.compiles or is_missing(contestant):
            continue
        outcome = contestant.run(job)
        assert (outcome.grads is None) == (contestant.side == "floor")
        if outcome.grads is not None:
            found[key] = outcome.grads
    assert {"higher", variants.EAGER} <= found.keys() or name == "very long"
    assert len(found) >= (2 if torchopt_unroll.torchopt is None else 3)
    reference = found["higher"]
    assert reference.keys() == job.hparams.keys()
    assert float(torch.cat([value.flatten() for value in reference.values()]).norm()) > 1e-4
    assert {key: relative_error(grads, reference) < 1e-9 for key, grads in found.items()} == dict.fromkeys(found, True)
    # Nobody left anything behind for the next one.
    after = {**job.hparams, **dict(job.network.named_parameters())}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(value.grad is None for value in after.values())


@pytest.mark.parametrize("name", WORKS)
def test_a_seed_gives_the_same_job_and_another_one_another(name: str) -> None:
    work = WORKS[name].tiny()

    def numbers(seed: int) -> torch.Tensor:
        job = job_of(work, seed)
        data = [*tree.batch_tensors(job.inner_batch(0)), *tree.batch_tensors(job.outer_batch)]
        tensors = [*job.hparams.values(), *job.network.parameters(), *data]
        return torch.cat([value.detach().double().flatten() for value in tensors])

    assert torch.equal(numbers(0), numbers(0))
    assert not torch.equal(numbers(0), numbers(1))


@pytest.mark.parametrize("name", WORKS)
def test_targets_name_contestants(name: str) -> None:
    work = WORKS[name]
    names = set(work.contestants())
    for target in work.targets():
        assert target.contestant in names
        assert target.against in {*names, "peers", "bytes", "trajectory_bytes"}
    if name != "very long":
        assert name == "params" or work.targets()
    assert list(work.contestants())[-1] == variants.PLAIN
    assert work.contestants()[variants.PLAIN].side == "floor"


def test_the_width_gives_the_wanted_number_of_parameters() -> None:
    for wanted in (1_000, 10_000, 100_000, 1_000_000):
        work = ParameterGrowth(num_params=wanted)
        count = sum(value.numel() for value in job_of(work).network.parameters())
        assert abs(count - wanted) < 0.03 * wanted


def test_the_transformer_sees_no_later_token() -> None:
    job = job_of(TransformerUnroll(num_layers=2, width=8, num_heads=2, num_tokens=5, num_sequences=2))
    tokens = job.inner_batch(0)[:, :-1]
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 64
    before, after = job.network(tokens), job.network(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])
    assert not torch.equal(before[:, 4], after[:, 4])


def test_reversible_counts_what_it_keeps() -> None:
    work = ReversibleUnroll(num_steps=40, batch_size=2, num_rows=5, hidden=3)
    figures = work.contestants()["reversible"].run(job_of(work)).figures
    weights = 784 * 3 + 3 + 2 * (9 + 3) + 3 * 10 + 10
    assert figures["trajectory_bytes"] == 40 * weights * 8
    # log2(1 / 0.9) = 0.152 bits per weight and step.
    assert figures["kept_bytes"] == pytest.approx(40 * 0.152 * weights / 8, rel=0.25)


class TestAgreement:
    reference: ClassVar = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor(1.0)}

    def test_is_the_worst_entry(self) -> None:
        found = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor(1.1)}
        assert relative_error(found, self.reference) == pytest.approx(0.1)
        assert relative_error(self.reference, self.reference) == 0.0

    def test_small_entries_are_judged_by_the_whole(self) -> None:
        reference = {"a": torch.tensor(1.0), "b": torch.tensor(0.0)}
        assert relative_error({"a": torch.tensor(1.0), "b": torch.tensor(1e-7)}, reference) == pytest.approx(1e-5)

    def test_anything_else_disagrees(self) -> None:
        assert math.isinf(relative_error({"a": self.reference["a"]}, self.reference))
        assert math.isinf(relative_error({**self.reference, "b": torch.ones(1)}, self.reference))
        assert math.isinf(relative_error({**self.reference, "b": torch.tensor(math.nan)}, self.reference))
        zeros = {"a": torch.zeros(2)}
        assert relative_error(zeros, zeros) == 0.0
        assert math.isinf(relative_error({"a": torch.ones(2)}, zeros))


class _FakeStopwatch(Stopwatch):
    """Says that a run takes as long as it returns."""

    def seconds(self, run, number=1):
        return sum(run() for _ in range(number)) / number


class TestRounds:
    def ran(self, seconds: dict[str, float], rounds: Rounds) -> tuple[list[str], dict[str, list[float]]]:
        order: list[str] = []

        def run_of(name: str):
            def run() -> float:
                order.append(name)
                return seconds[name]

            return run

        times = rounds.times({name: run_of(name) for name in seconds}, _FakeStopwatch(device=CPU))
        return order, times

    def test_contestants_take_turns_and_each_begins_once(self) -> None:
        order, times = self.ran({"a": 1.0, "b": 2.0, "c": 3.0}, Rounds(repetitions=3, shortest=0.5, longest=100.0))
        assert "".join(order) == "abc" + "abc" + "bca" + "cab"
        assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}

    def test_short_runs_are_repeated_and_long_ones_stop(self) -> None:
        order, times = self.ran({"short": 0.25, "long": 8.0}, Rounds(repetitions=4, shortest=1.0, longest=10.0))
        assert order.count("short") == 1 + 4 * 4
        assert len(times["long"]) == 2
        assert len(times["short"]) == 4

    def test_everyone_is_timed_once(self) -> None:
        _, times = self.ran({"a": 50.0}, Rounds(repetitions=3, shortest=0.0, longest=1.0))
        assert times == {"a": [50.0]}

    def test_nobody(self) -> None:
        assert self.ran({}, Rounds(repetitions=3, shortest=0.0, longest=1.0)) == ([], {})


def row(contestant: str, side: str = "ours", **values) -> Row:
    given = {"work": "w", "title": "a work", "size": None, "library": "some", **values}
    return Row(contestant=contestant, side=side, **given)  # type: ignore[arg-type]


ROWS = [
    row("slow peer", "peer", min_seconds=4.0, peak_bytes=100),
    row("fast peer", "peer", min_seconds=2.0, peak_bytes=400),
    row("by hand", "by hand", min_seconds=0.5, peak_bytes=10),
    row("own", min_seconds=1.0, peak_bytes=50, figures={"kept": 3.0, "stored": 300.0}),
    row("broken", notes=("not measured: TypeError: no such thing",)),
    row("plain", "floor", min_seconds=0.25, peak_bytes=1),
]


class TestRatios:
    def ratio(self, contestant: str, quantity: str, against: str, at_most: float = 0.5):
        target = Target(contestant=contestant, quantity=quantity, against=against, at_most=at_most)
        return measured_ratio(target, ROWS)

    def test_against_the_best_peer_of_each_quantity(self) -> None:
        time = self.ratio("own", "time", "peers")
        assert (time.figure, time.against, time.reached) == (0.5, "fast peer", True)
        memory_ratio = self.ratio("own", "memory", "peers", at_most=0.49)
        assert (memory_ratio.figure, memory_ratio.against, memory_ratio.reached) == (0.5, "slow peer", False)

    def test_against_others(self) -> None:
        assert self.ratio("own", "time", "plain", 6.0).figure == 4.0
        assert self.ratio("own", "time", "by hand", 6.0).figure == 2.0
        assert self.ratio("own", "memory", "bytes", 51).figure == 50.0
        assert self.ratio("own", "memory", "bytes", 51).reached is True
        assert self.ratio("own", "kept", "stored", 0.01).figure == 0.01

    def test_what_is_missing_is_said(self) -> None:
        broken = self.ratio("broken", "time", "peers")
        assert (broken.figure, broken.reached) == (None, None)
        assert broken.notes == "broken; not measured: TypeError: no such thing"
        assert self.ratio("own", "time", "broken").notes == "broken; not measured: TypeError: no such thing"
        assert self.ratio("nobody", "time", "peers").figure is None
        assert self.ratio("own", "unheard of", "stored").figure is None
        alone = measured_ratio(Target(contestant="own", quantity="time", against="peers", at_most=1), ROWS[3:])
        assert (alone.figure, alone.notes) == (None, "peers")

    def test_as_markdown(self) -> None:
        lines = ratio_lines(
            [
                self.ratio("own", "time", "peers", 1 / 12),
                self.ratio("broken", "time", "peers"),
                self.ratio("own", "memory", "bytes", 2**30),
            ]
        )
        assert lines[2] == "| a work | own | time | fast peer | at most 1/12 | 0.5 | no |"
        assert lines[3].endswith("| at most 0.5 | not measured (broken; not measured: TypeError: no such thing) |  |")
        assert lines[4] == "| a work | own | memory | bytes | at most 1 GiB | 50 B | yes |"


def swept(contestant: str, figures: dict[int, float | None]) -> list[Row]:
    return [row(contestant, size=size, min_seconds=value) for size, value in figures.items()]


class TestSweep:
    def test_the_exponent_of_a_power(self) -> None:
        fit = growth(swept("a", {size: 3.0 * size**1.5 for size in (1, 10, 100, 1000)}), "time")
        assert fit is not None
        assert fit.exponent == pytest.approx(1.5)
        assert fit.factor == pytest.approx(3.0)
        assert (fit.first, fit.last) == (10, 1000)

    def test_what_does_not_grow_at_small_sizes_is_left_out(self) -> None:
        fit = growth(swept("a", {size: max(100.0, size) for size in (1, 3, 10, 100, 1000, 10_000)}), "time")
        assert fit is not None
        assert fit.exponent == pytest.approx(1.0)

    def test_too_few_points(self) -> None:
        assert growth(swept("a", {1: 1.0, 2: 2.0}), "time") is None
        assert growth(swept("a", {1: 1.0, 2: None, 3: 3.0}), "time") is None
        assert growth(swept("a", {1: 1.0, 2: 2.0, 3: 3.0}), "memory") is None

    def test_where_two_cross(self) -> None:
        rows = swept("a", {1: 1.0, 10: 10.0, 100: 100.0}) + swept("b", {1: 31.6, 10: 31.6, 100: 31.6})
        assert crossover(rows, "a", "b") == pytest.approx(31.6, rel=1e-6)
        assert crossover(rows, "b", "a") is None
        assert crossover(rows, "a", "nobody") is None


def test_reasons() -> None:
    assert reason(TypeError("no such keyword\nmore")) == "TypeError: no such keyword"
    assert reason(NotMeasured("there are no tasks")) == "there are no tasks"
    assert len(reason(RuntimeError("x" * 1000))) == 200
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("something else"))


def test_figures_for_people() -> None:
    assert [time_words(value) for value in (None, 2.0, 0.0123, 4e-6)] == ["-", "2 s", "12.3 ms", "4 us"]
    assert [byte_words(value) for value in (None, 5, 2048, 3 * 2**20, 2**30)] == [
        "-", "5 B", "2 KiB", "3 MiB", "1 GiB",
    ]  # fmt: skip


class _Fixed(Contestant):
    """Returns what it is told to, or raises it."""

    def __init__(self, answer, side="peer", compiles=False) -> None:
        self.answer, self.side, self.compiles = answer, side, compiles
        self.runs = 0

    @property
    def library(self) -> str:
        return "test"

    def run(self, job: Job) -> Outcome:
        self.runs += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return Outcome(grads=self.answer)


class _FixedWork(SmallUnroll):
    def contestants(self):
        return self.given  # type: ignore[attr-defined]


def measured_here(monkeypatch: pytest.MonkeyPatch, given: dict[str, Contestant], **changes) -> dict[str, Row]:
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)
    monkeypatch.setattr(measure, "in_own_process", lambda function, argument, _: function(argument))
    work = _FixedWork(num_steps=1, num_rows=2, hidden=2)
    object.__setattr__(work, "given", given)
    settings = measure.Settings(
        seed=0, device=CPU, dtype=torch.float64, rounds=Rounds(repetitions=2, shortest=0.0, longest=1.0),
        tolerance=1e-4, memory=False, memory_limit=2**30, longest_run=60.0, longest_work=60.0,
    )  # fmt: skip
    rows = measure.measure("w", work, None, replace(settings, **changes), lambda _: None)
    assert [item.contestant for item in rows] == [name for name in given if name in changes.get("contestants", given)]
    return {item.contestant: item for item in rows}


def test_the_first_hypergradient_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"weight": torch.tensor([1.0, 2.0])}
    close, wrong = {"weight": torch.tensor([1.0, 2.0001])}, {"weight": torch.tensor([1.0, 2.001])}
    contestants = {
        "failing": _Fixed(TypeError("no such keyword")),
        "right": _Fixed(right),
        "close": _Fixed(close),
        "wrong": _Fixed(wrong),
        "floor": _Fixed(None, "floor"),
    }
    rows = measured_here(monkeypatch, contestants)
    assert rows["failing"].notes == ("not measured: TypeError: no such keyword",)
    assert rows["failing"].min_seconds is rows["failing"].error is None
    assert {name: rows[name].agrees for name in contestants} == {
        "failing": None, "right": True, "close": True, "wrong": False, "floor": None,
    }  # fmt: skip
    assert {rows[name].reference for name in ("right", "close", "wrong")} == {"right"}
    assert rows["wrong"].repetitions == 2
    assert rows["wrong"].min_seconds is not None
    # The first run, one to warm up, two rounds.
    assert contestants["floor"].runs == 4


def test_a_refused_compilation_is_that_of_all_compiled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"weight": torch.tensor([1.0])}
    later = _Fixed(right, compiles=True)
    rows = measured_here(
        monkeypatch,
        {"a": _Fixed(NotCompiled("cannot be compiled"), compiles=True), "b": later, "c": _Fixed(right)},
    )
    assert rows["b"].notes == ("not measured: cannot be compiled",)
    assert later.runs == 0
    assert rows["c"].agrees is True


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(request: MemoryRequest) -> int:
        if request.contestant == "large":
            raise NotMeasured("needs more than 1.0 GiB")
        return 123

    monkeypatch.setattr(measure, "peak_bytes", peak)
    large = _Fixed({"weight": torch.ones(1)})
    rows = measured_here(monkeypatch, {"large": large, "small": _Fixed({"weight": torch.ones(1)})}, memory=True)
    assert large.runs == 0
    assert rows["large"].notes == ("not measured: needs more than 1.0 GiB",)
    assert rows["small"].peak_bytes == 123
    assert rows["small"].min_seconds is not None


def test_only_some_contestants(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured_here(monkeypatch, {"a": _Fixed(None), "b": _Fixed(None)}, contestants=["b"])
    assert rows.keys() == {"b"}


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchopt_unroll, "torchopt", None)
    for name in (variants.TORCHOPT, variants.TORCHOPT_FUNCTIONAL, variants.TORCHOPT_VECTORISED):
        with pytest.raises(NotMeasured, match=r"torchopt is not installed .*extra `benchmark`"):
            variants.VARIANTS[name].run(job_of(SmallUnroll().tiny()))
    monkeypatch.setattr(memory, "psutil", None)
    with pytest.raises(NotMeasured, match=r"psutil is not installed .*extra `benchmark`"):
        peak_bytes(memory_request(SmallUnroll().tiny(), variants.PLAIN))


def test_a_backend_is_made_only_when_it_runs() -> None:
    def unknown(**_: object):
        raise TypeError("unexpected keyword")

    contestant = Ours(backend=unknown)
    with pytest.raises(TypeError, match="unexpected keyword"):
        contestant.run(job_of(SmallUnroll().tiny()))


def memory_request(work: Work, contestant: str, limit: int = 2**32) -> MemoryRequest:
    return MemoryRequest(
        work=work, contestant=contestant, seed=0, device="cpu", dtype=torch.float32, num_threads=1, limit=limit,
        longest=120.0,
    )  # fmt: skip


def test_memory_of_a_process_of_its_own() -> None:
    """The graph of a step holds at least the hidden layer's outputs; plain training holds those of one step."""
    pytest.importorskip("psutil", reason="psutil is not installed; it comes with the extra `benchmark`")
    work = LargeUnroll(num_steps=8, num_rows=1000, features=16, hidden=2000)
    hidden = 1000 * 2000 * 4
    whole, plain = (peak_bytes(memory_request(work, name)) for name in (variants.EAGER, variants.PLAIN))
    assert 8 * hidden < whole < 64 * hidden
    assert hidden < plain < whole / 2
    if sys.platform == "linux":
        with pytest.raises(NotMeasured, match=r"^needs more than 45.8 MiB$"):
            peak_bytes(memory_request(work, variants.EAGER, limit=6 * hidden))


def test_a_process_that_fails_or_lasts_is_said() -> None:
    with pytest.raises(NotMeasured, match=r"its process failed \(ValueError: "):
        in_own_process(int, "no number", 60.0)
    with pytest.raises(NotMeasured, match="takes more than 0.05 s"):
        in_own_process(int, "1", 0.05)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(timing.gc, "collect", lambda: 0)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(measure, "in_own_process", lambda function, argument, _: function(argument))
        monkeypatch.setattr(measure, "peak_bytes", lambda request: 1000 * len(request.contestant))
        self.folder, self.monkeypatch, self.capsys = tmp_path / "run", monkeypatch, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        words = ["benchmark.py", "paths.run_dir=run", "quick=true", "num_threads=1", *arguments]
        self.monkeypatch.setattr(sys, "argv", words)
        code = benchmark.failures.exit_code(benchmark.main)
        GlobalHydra.instance().clear()
        written = self.capsys.readouterr()
        return code, written.out, written.err

    def test_a_run_leaves_json_csv_markdown_and_pictures(self) -> None:
        some = "contestants=[higher,whole graph,forward,plain training]"
        code, out, error = self.run("only=[small_unroll,forward_hparams]", some)
        assert code == 0, error
        results = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        rows = {(item["work"], item["size"], item["contestant"]): item for item in results["rows"]}
        expected = {("small_unroll", None, name) for name in ("higher", "whole graph", "plain training")}
        names = ("higher", "whole graph", "forward", "plain training")
        expected |= {("forward_hparams", size, name) for size in (1, 2) for name in names}
        assert rows.keys() == expected
        for item in rows.values():
            assert item["notes"] == []
            assert 0 < item["min_seconds"] <= item["median_seconds"]
            assert item["peak_bytes"] == 1000 * len(item["contestant"])
            assert item["agrees"] is (None if item["contestant"] == "plain training" else True)
        with (self.folder / "rows.csv").open(encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(rows)
        assert results["written"]
        assert results["versions"]["torch"] == torch.__version__
        assert results["versions"]["higher"]
        assert results["machine"]["torch_threads"] == 1
        assert results["machine"]["cpu"]
        assert results["settings"]["quick"] is True
        assert results["command"].startswith("scripts/benchmark paths.run_dir=run quick=true")
        ratios = {(item["work"], item["size"], item["contestant"], item["against"]): item for item in results["ratios"]}
        line = ratios["forward_hparams", 2, "forward", "plain training"]
        assert line["at_most"] == 5.0
        two = {name: rows["forward_hparams", 2, name]["min_seconds"] for name in ("forward", "plain training")}
        assert line["figure"] == pytest.approx(two["forward"] / two["plain training"])
        assert ratios["small_unroll", None, "whole graph", "higher"]["reached"] in (True, False)
        assert ratios["small_unroll", None, "whole graph, compiled", "higher"]["reached"] is None
        assert "not measured (whole graph, compiled)" in (self.folder / "ratios.md").read_text(encoding="utf-8")
        assert results["sweeps"]["forward_hparams"].keys() == {"axis", "exponents", "forward_crosses_reverse_at"}
        assert (self.folder / "forward_hparams.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert "everything is in" in out

    FAILURES: ClassVar = {
        "unknown work": (("only=[smal]",), "`only` names 'smal'"),
        "no repetitions": (("repetitions=0",), "`repetitions` is 0"),
        "nothing to resume": (("resume=true",), "`resume` is True"),
        "unknown size": (("sweeps.steps.size=hidden_layers",), "`sweeps.steps.size` is 'hidden_layers'"),
        "no sizes": (("sweeps.steps.values=[]",), "`sweeps.steps.values` is []"),
        "unknown argument": (("+works.small_unroll.shape=3",), "`works.small_unroll.shape` is no argument"),
        "no memory": (("memory_limit=much",), "`memory_limit` is 'much'"),
        "unknown contestant": (("contestants=[nobody]",), "`contestants` names 'nobody'"),
    }

    @pytest.mark.parametrize("case", FAILURES)
    def test_a_mistake_gives_one_message(self, case: str) -> None:
        overrides, expected = self.FAILURES[case]
        code, _, error = self.run(*overrides)
        assert code == 1
        assert error.count("error: ") == 1
        assert "Traceback" not in error
        assert expected in error
        assert not (self.folder / "results.json").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self) -> None:
        code, _, error = self.run("device=cuda")
        assert code == 1
        assert "`device` is 'cuda'" in error


def test_works_take_sizes_only() -> None:
    """So that a sweep can set them, and a process be told of them."""
    for work in WORKS.values():
        assert all(isinstance(getattr(work, item.name), (int, str)) for item in fields(work))  # type: ignore[arg-type]


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["small", "sinusoid", "conv maml"])
def test_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    work = WORKS[name].tiny()
    job = work.job(seed=0, device=device, dtype=torch.float64)
    found = work.contestants()[variants.EAGER].run(job).grads
    expected = work.contestants()["higher"].run(job).grads
    assert found is not None
    assert expected is not None
    assert relative_error(found, expected) < 1e-9
    assert Stopwatch(device=device).seconds(lambda: work.contestants()[variants.EAGER].run(job)) > 0
    assert peak_bytes(replace(memory_request(work, variants.EAGER), device="cuda")) > 0
