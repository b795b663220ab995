"""A work measured: what cannot be measured is a row that says why, and nobody else's loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import (
    SmallUnroll,
    measure,
    memory,
    timing,
    torchopt_unroll,
    variants,
)
from benchmarks.contestant import Contestant, NotMeasured, Outcome
from benchmarks.job import Job
from benchmarks.memory import MemoryRequest, peak_bytes
from benchmarks.row import Row
from benchmarks.timing import Rounds
from benchmarks.turns import Turns
from tests.benchmarks.benchmark_works import CPU, job_of, memory_request


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


def measured_here(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Contestant], start=None, **changes
) -> dict[str, Row]:
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)
    monkeypatch.setattr(measure, "start", start or (lambda request, **_: Turns(request)))
    work = _FixedWork(num_steps=1, num_rows=2, hidden=2)
    object.__setattr__(work, "given", given)
    settings = measure.Settings(
        seed=0, device=CPU, dtype=torch.float64, num_threads=None, tolerance=1e-4,
        rounds=Rounds(repetitions=2, shortest=0.0, longest=1.0),
        memory=False, memory_limit=2**30, longest_run=60.0, longest_work=60.0,
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
    quartiles = (rows["wrong"].lower_quartile_seconds, rows["wrong"].upper_quartile_seconds)
    assert min(quartiles) <= rows["wrong"].median_seconds <= max(quartiles)  # type: ignore[type-var]
    # The first run, one to count operations, one to warm up, two rounds.
    assert contestants["floor"].runs == 5


def test_what_only_rounding_sets_apart_agrees_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rounded(_Fixed):
        """Right in float64, and off by so much in float32."""

        def run(self, job: Job) -> Outcome:
            rounded = next(job.network.parameters()).dtype is torch.float32
            return Outcome(grads={"weight": torch.tensor([1.0, 2.0 + rounded * self.answer])})

    right = _Fixed({"weight": torch.tensor([1.0, 2.0])})
    wrong = _Fixed({"weight": torch.tensor([1.0, 2.001])})
    given = {"right": right, "kinked": Rounded(1e-3), "wrong": wrong, "far": Rounded(0.1)}
    rows = measured_here(monkeypatch, given, dtype=torch.float32)
    agrees = {name: row.agrees for name, row in rows.items()}
    assert agrees == {"right": True, "kinked": True, "wrong": False, "far": False}
    assert rows["kinked"].error == rows["wrong"].error == pytest.approx(1e-3 / 5**0.5, rel=1e-3)
    assert [row.error_in_float64 for row in rows.values()] == [None, 0.0, rows["wrong"].error, None]
    assert measured_here(monkeypatch, given)["kinked"].error == 0.0


def test_what_takes_long_runs_once_and_once_more_in_each_process_if_it_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = {"weight": torch.tensor([1.0])}
    contestants = {"plain": _Fixed(right), "compiled": _Fixed(right, compiles=True)}
    rows = measured_here(monkeypatch, contestants, rounds=Rounds(repetitions=3, shortest=0.0, longest=0.0))
    assert {name: item.runs for name, item in contestants.items()} == {"plain": 1, "compiled": 3}
    assert {name: item.repetitions for name, item in rows.items()} == {"plain": 1, "compiled": 1}
    assert rows["plain"].min_seconds == rows["plain"].first_seconds


def test_what_compiles_is_run_in_a_second_process_with_the_caches_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = {"weight": torch.tensor([1.0])}
    given = {"plain": _Fixed(right), "a": _Fixed(right, compiles=True), "b": _Fixed(right, compiles=True)}
    started: list[tuple[str, object, object]] = []
    on_all: list[bool] = []

    def start(request, *, folder, caches, ends, on_all_cores):
        started.append((request.contestant, folder, caches))
        on_all.append(on_all_cores)
        return Turns(request)

    rows = measured_here(monkeypatch, given, start=start)
    assert [name for name, *_ in started] == ["plain", "a", "a", "b", "b"]
    # Where it compiles, and not where it is timed.
    assert on_all == [False, True, False, True, False]
    folders, caches = zip(*((folder, cache) for _, folder, cache in started), strict=True)
    assert len({*folders, *caches}) == 5 + 3
    assert caches[1] == caches[2] != caches[3] == caches[4]
    assert rows["plain"].second_process_seconds is None
    assert rows["plain"].operations == rows["plain"].moved_bytes == 0
    assert rows["a"].second_process_seconds is not None
    assert rows["a"].operations is rows["a"].moved_bytes is None


def test_a_turn_that_fails_is_that_of_all_who_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(_Fixed):
        """Fails when it is timed."""

        def run(self, job: Job) -> Outcome:
            if self.runs == 3:
                raise NotMeasured("takes more than 60 s")
            return super().run(job)

    right = {"weight": torch.tensor([1.0])}
    given = {"failing": _Fixed(TypeError("no")), "late": Late(right), "right": _Fixed(right)}
    rows = measured_here(monkeypatch, given)
    late = "not measured: takes more than 60 s"
    assert [row.notes for row in rows.values()] == [("not measured: TypeError: no",), (late,), (late,)]
    assert rows["right"].agrees is True


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
