"""The command: what a run leaves, and one message for a mistake."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from benchmarks import compare_libraries, measure, timing
from benchmarks.row import Row
from benchmarks.turns import Turns
from benchmarks.work import Work


class TestCommand:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(timing.gc, "collect", lambda: 0)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(measure, "start", lambda request, **_: Turns(request))
        monkeypatch.setattr(measure, "peak_bytes", lambda request: 1000 * len(request.contestant))
        self.folder, self.monkeypatch, self.capsys = tmp_path / "run", monkeypatch, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        words = ["compare_libraries.py", "paths.run_dir=run", "quick=true", "threads=1", *arguments]
        self.monkeypatch.setattr(sys, "argv", words)
        code = compare_libraries.failures.exit_code(compare_libraries.main)
        GlobalHydra.instance().clear()
        written = self.capsys.readouterr()
        return code, written.out, written.err

    def written(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))

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
            assert item["operations"] > 4
            assert item["moved_bytes"] > 1000
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

    def test_an_interrupted_benchmark_goes_on(self) -> None:
        some = "contestants=[higher,whole graph]"
        measured = measure.measure

        def interrupted(name: str, work: Work, size: int | None, *rest: Any) -> list[Row]:
            if size == 2:
                raise KeyboardInterrupt
            return measured(name, work, size, *rest)

        self.monkeypatch.setattr(compare_libraries, "measure", interrupted)
        chosen = "only=[small_unroll,forward_hparams]"
        assert self.run(chosen, some)[0] != 0
        before = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        assert [(item["work"], item["size"]) for item in before["rows"][::2]] == [
            ("small_unroll", None), ("forward_hparams", 1),
        ]  # fmt: skip

        before["machine"]["load_average"] = [9.0, 9.0, 9.0]
        (self.folder / "results.json").write_text(json.dumps(before), encoding="utf-8")
        self.monkeypatch.setattr(compare_libraries, "measure", measured)
        code, out, error = self.run("only=[forward_hparams]", some, "resume=true")
        assert code == 0, error
        after = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        assert after["rows"][:4] == before["rows"]
        assert [(item["work"], item["size"]) for item in after["rows"][4::2]] == [("forward_hparams", 2)]
        assert after["command"] == before["command"]
        assert {item["work"] for item in after["ratios"]} == {"small_unroll"}
        assert "2 outer variables" in out
        assert "1 outer variables" not in out

        before["versions"]["torch"] = "1.0"
        (self.folder / "results.json").write_text(json.dumps(before), encoding="utf-8")
        code, _, error = self.run(some, "resume=true")
        assert code == 1
        assert "was measured with other versions" in error

    def test_one_name_needs_no_brackets_and_a_comma_quotes(self) -> None:
        code, _, error = self.run("only=small_unroll", 'contestants="TorchOpt, functional"')
        assert code == 0, error
        assert [item["contestant"] for item in self.written()["rows"]] == ["TorchOpt, functional"]

    def test_a_work_in_which_nobody_takes_part_is_passed_over(self) -> None:
        code, out, error = self.run("only=[small_unroll,forward_hparams]", "contestants=[forward]")
        assert code == 0, error
        assert "none of the contestants takes part" in out
        assert {item["work"] for item in self.written()["rows"]} == {"forward_hparams"}

    def test_who_disagrees_reaches_nothing(self) -> None:
        some = ("only=small_unroll", "contestants=[higher,whole graph]")
        self.monkeypatch.setattr(measure, "relative_error", lambda found, reference: 1e-3 * (found is not reference))
        code, _, error = self.run(*some)
        assert code == 0, error
        own = next(item for item in self.written()["rows"] if item["contestant"] == "whole graph")
        assert own["agrees"] is False
        ratio = next(item for item in self.written()["ratios"] if item["contestant"] == "whole graph")
        assert ratio["figure"] > 0
        assert ratio["reached"] is False
        assert ratio["notes"] == "whole graph disagrees with higher, relative error 1.0e-03"
        assert ratio["notes"] in (self.folder / "ratios.md").read_text(encoding="utf-8")

    def test_results_that_cannot_be_read(self) -> None:
        some = ("only=small_unroll", "contestants=higher")
        assert self.run(*some)[0] == 0
        results = self.folder / "results.json"
        whole = results.read_text(encoding="utf-8")
        held = json.loads(whole)
        damaged = {
            "truncated": whole[: len(whole) // 2],
            "empty": "",
            "a list": "[]",
            "without rows": json.dumps({key: value for key, value in held.items() if key != "rows"}),
            "without versions": json.dumps({key: value for key, value in held.items() if key != "versions"}),
            "other versions": json.dumps({**held, "versions": 3}),
            "strange rows": json.dumps({**held, "rows": [{"work": "small_unroll"}]}),
        }
        for case, text in damaged.items():
            results.write_text(text, encoding="utf-8")
            code, _, error = self.run(*some, "resume=true")
            assert (code, error.count("error: "), "Traceback" in error) == (1, 1, False), (case, error)
            assert "results.json' is not as a benchmark writes it" in error, case
            assert "delete it to measure everything anew" in error
        for content, reason in (
            (b"\xff\xfe\x00", "is no text in UTF-8"),
            (b" " * (2**24 + 1), "has 16 MiB, more than the 16 MiB"),
            (b"[" * 50_000, "is not as a benchmark writes it"),
        ):
            results.write_bytes(content)
            code, _, error = self.run(*some, "resume=true")
            assert (code, error.count("error: "), "Traceback" in error) == (1, 1, False), (reason, error)
            assert reason in error and "delete it to measure everything anew" in error, error
        results.unlink()
        assert self.run(*some, "resume=true")[0] == 0
        assert len(self.written()["rows"]) == 1

    def test_every_part_says_with_which_code_it_was_measured(self) -> None:
        some = "contestants=[higher,whole graph]"
        self.monkeypatch.setattr(measure, "commit", lambda: "1234567")
        self.monkeypatch.setattr(measure, "load_average", lambda: [0.5, 0.6, 0.7])
        assert self.run("only=small_unroll", some)[0] == 0
        results = self.written()
        # As a benchmark without these two columns left it.
        for item in results["rows"]:
            assert (item.pop("commit"), item.pop("load_average")) == ("1234567", 0.5)
        (self.folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        self.monkeypatch.setattr(measure, "commit", lambda: "89abcde+")
        self.monkeypatch.setattr(measure, "load_average", lambda: None)
        code, out, error = self.run("only=sinusoid_maml", some, "resume=true")
        assert code == 0, error
        assert [item["commit"] for item in self.written()["rows"]] == [None] * 2 + ["89abcde+"] * 2
        assert [item["load_average"] for item in self.written()["rows"]] == [None] * 4
        with (self.folder / "rows.csv").open(encoding="utf-8", newline="") as file:
            assert [item["commit"] for item in csv.DictReader(file)] == ["", "", "89abcde+", "89abcde+"]
        assert "89abcde" not in out

    def test_help_names_every_setting_work_and_sweep(self) -> None:
        with pytest.raises(SystemExit) as ended:
            self.run("--help")
        assert ended.value.code == 0
        out = self.capsys.readouterr().out
        with initialize_config_dir(str(compare_libraries.MAIN_CONFIG.parent), version_base="1.3"):
            config = compose("compare_libraries")
        words = set(re.findall(r"\w+", out))
        assert {str(name) for name in [*config, *config.works, *config.sweeps]} - {"task_name"} <= words
        assert "--cuda" in out
        assert not {"learner", "dynamics", "backbone"} & words

    FAILURES: ClassVar = {
        "unknown work": (
            ("only=[smal]",),
            "`only` names 'smal', which is neither a work nor a sweep. Choose from: 'sin",
        ),
        "unknown work alone": (("only=smal",), "`only` names 'smal'"),
        "no work": (("only=[]",), "`only` is [], but it lists names: at least one is needed"),
        "number of a work": (("only=3",), "`only` is 3, but it lists names"),
        "no contestant": (("contestants=[]",), "`contestants` is [], but it lists names: at least one is needed"),
        "name with a comma": (
            ("contestants=[step-wise, compiled]",),
            """'contestants=[higher,"whole graph, compiled"]'""",
        ),
        "name with brackets": (("contestants=[sqrt(T)]",), "needs double quotes of its own: 'setting="),
        "word for a time": (("longest_timing=abc",), "`longest_timing` is 'abc'"),
        "no time": (("longest_timing=0",), "`longest_timing` is 0"),
        "word for the time of a work": (("longest_work=abc",), "`longest_work` is 'abc'"),
        "negative time of a run": (("longest_run=-5",), "`longest_run` is -5, but a run may take so long, so a finite"),
        "endless run": (("longest_run=inf",), "`longest_run` is inf"),
        "negative repetition": (("shortest_repetition=-1",), "`shortest_repetition` is -1"),
        "negative tolerance": (("tolerance=-1",), "`tolerance` is -1"),
        "no tolerance": (("tolerance=0",), "`tolerance` is 0"),
        "switch for a tolerance": (("tolerance=true",), "`tolerance` is True"),
        "memory perhaps": (("memory=maybe",), "`memory` is 'maybe', but it is a switch"),
        "quick perhaps": (("quick=maybe",), "`quick` is 'maybe', but it is a switch"),
        "negative steps": (
            ("works.small_unroll.num_steps=-3",),
            "`works.small_unroll.num_steps` is -3, but it is a size",
        ),
        "no steps": (("works.conv_maml_4.num_tasks=0",), "`works.conv_maml_4.num_tasks` is 0"),
        "word for a size": (("works.small_unroll.num_steps=many",), "`works.small_unroll.num_steps` is 'many'"),
        "half a size": (("+works.small_unroll.hidden=1.5",), "`works.small_unroll.hidden` is 1.5"),
        "no size of a sweep's work": (("sweeps.forward_steps.work.num_hparams=0",), "work.num_hparams` is 0"),
        "unknown kind": (("works.conv_maml_4.downsample=mean",), "`works.conv_maml_4.downsample` is 'mean'"),
        "no work at all": (
            ("+works.mine={_target_:fractions.Fraction}",),
            "`works.mine` is a Fraction, which is no work",
        ),
        "no repetitions": (("repetitions=0",), "`repetitions` is 0"),
        "nothing to resume": (("resume=true",), "where there is no run to go on with"),
        "word for a switch": (("resume=maybe",), "`resume` is 'maybe'"),
        "unknown size": (("sweeps.steps.size=hidden_layers",), "`sweeps.steps.size` is 'hidden_layers'"),
        "no sizes": (("sweeps.steps.values=[]",), "`sweeps.steps.values` is []"),
        "unknown argument": (("+works.small_unroll.shape=3",), "`works.small_unroll.shape` is no argument"),
        "no memory": (("memory_limit=much",), "`memory_limit` is 'much'"),
        "unknown contestant": (("contestants=nobody",), "`contestants` names 'nobody'"),
    }

    @pytest.mark.sampled(4)
    @pytest.mark.parametrize("case", FAILURES)
    def test_a_mistake_gives_one_message(self, case: str) -> None:
        overrides, expected = self.FAILURES[case]
        code, _, error = self.run("only=[small_unroll]", "contestants=[higher]", *overrides)
        assert code == 1
        assert error.count("error: ") == 1
        assert "Traceback" not in error
        assert expected in error
        assert not (self.folder / "results.json").exists()

    IDLE: ClassVar = {
        "a work that is left out": (("works.large_unroll.num_steps=3",), "`only` leaves 'large_unroll' out"),
        "a sweep that is left out": (("sweeps.steps.values=[1,2]",), "`only` leaves 'steps' out"),
        "a new work that is left out": (
            ("+works.mine={_target_: benchmarks.SmallUnroll}",),
            "`works.mine._target_` is given, but `only` leaves 'mine' out",
        ),
        "a size that a tiny work has of its own": (("works.small_unroll.num_steps=77",), "`quick` takes a size"),
        "rounds": (("repetitions=3",), "`quick` takes rounds of its own"),
        "length of a repetition": (("shortest_repetition=0.1",), "`quick` takes rounds of its own"),
        "longest timing": (("longest_timing=9",), "`quick` takes rounds of its own"),
        "sizes beyond the smallest two": (
            ("only=[forward_hparams]", "sweeps.forward_hparams.values=[1,2,3]"),
            "`quick` takes the smallest 2",
        ),
        "a limit of what is not measured": (("memory=false", "memory_limit=1GiB"), "`memory` is false"),
        "a time of what is not measured": (("memory=false", "longest_run=9"), "`memory` is false"),
    }

    @pytest.mark.parametrize("case", IDLE)
    def test_a_setting_of_what_is_left_out_is_refused(self, case: str) -> None:
        overrides, expected = self.IDLE[case]
        only = () if overrides[0].startswith("only=") else ("only=[small_unroll]",)
        code, _, error = self.run(*only, "contestants=[higher]", *overrides)
        assert (code, error.count("error: "), "Traceback" in error) == (1, 1, False), error
        assert expected in error and "it would have no effect" in error, error
        assert not (self.folder / "config.yaml").exists()

    def test_what_a_tiny_work_keeps_can_be_set(self) -> None:
        code, _, error = self.run("only=[conv_maml_4]", "contestants=[higher]", "works.conv_maml_4.downsample=stride")
        assert code == 0, error
        assert "stride" in self.written()["rows"][0]["title"]

    def test_a_part_that_goes_on_may_leave_out_what_the_first_one_set(self) -> None:
        some = ("contestants=[higher]", "quick=false", "works.small_unroll.num_steps=3", "memory=false")
        times = ("repetitions=1", "shortest_repetition=0")
        assert self.run("only=[small_unroll]", *some, *times)[0] == 0
        code, _, error = self.run("only=[sinusoid_maml]", *some, *times, "resume=true")
        assert code == 0, error
        assert [row["work"] for row in self.written()["rows"]] == ["small_unroll", "sinusoid_maml"]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self) -> None:
        code, _, error = self.run("device=cuda")
        assert code == 1
        assert "`device` is 'cuda'" in error
