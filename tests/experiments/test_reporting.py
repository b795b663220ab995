"""The figures that a run leaves: each is the one that its name says, of several that differ."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401
import hypertorch as ht
from experiments import train
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.results.reporting import check_figures, duration, print_reports, report_as_dict, write_results
from experiments.common.runs.experiment import build_experiment
from experiments.common.runs.run_folder import RunFolder
from hypertorch.outer import Estimate

REPORTS = {
    "meta_train": ht.Report(
        metrics={
            "accuracy": Estimate(mean=0.98765, half_width=0.00314, count=600),
            "outer_loss": Estimate(mean=0.0512, half_width=0.00217, count=600),
        },
        seconds=61.0,
    ),
    "meta_val": ht.Report(
        metrics={
            "accuracy": Estimate(mean=0.9, half_width=0.0123, count=500),
            "outer_loss": Estimate(mean=1.25, half_width=0.5, count=500),
        },
        seconds=30.0,
    ),
    "meta_test": ht.Report(
        metrics={
            "accuracy": Estimate(mean=0.5, half_width=math.nan, count=1),
            "outer_loss": Estimate(mean=2.0, half_width=math.inf, count=1),
        },
        seconds=29.0,
    ),
}
TRAINED = ht.Trained(
    hparams={"w": torch.zeros(2)},
    best_hparams={"w": torch.ones(2)},
    best_step=40,
    best_value=0.875,
    num_outer_steps=50,
    seconds=150.0,
)


def printed(*, width: int = 120) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=width), text


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if name in line]
    return [cell.strip() for cell in line.strip("│┃ ").split("│")]


def test_a_table_has_every_figure_in_its_place_and_accuracy_in_percent() -> None:
    console, text = printed()
    print_reports(console, "a title", REPORTS)
    shown = text.getvalue()
    assert row(shown, "meta_train") == ["meta_train", "98.77 ± 0.31 %", "0.0512 ± 0.0022", "600"]
    assert row(shown, "meta_val") == ["meta_val", "90.00 ± 1.23 %", "1.2500 ± 0.5000", "500"]
    assert row(shown, "meta_test") == ["meta_test", "50.00 %", "2.0000 ± inf", "1"]
    header = next(line for line in shown.splitlines() if "split" in line)
    assert header.index("accuracy") < header.index("outer_loss") < header.index("episodes")
    assert "a title" in shown and "mean ± 95 % interval" in shown


def test_figures_go_into_the_file_as_they_are(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", {name: report_as_dict(report) for name, report in REPORTS.items()})
    held = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert held["meta_train"]["accuracy"] == {"mean": 0.98765, "half_width_95": 0.00314, "num_episodes": 600}
    assert held["meta_val"]["outer_loss"] == {"mean": 1.25, "half_width_95": 0.5, "num_episodes": 500}
    assert held["meta_test"]["accuracy"] == {"mean": 0.5, "half_width_95": None, "num_episodes": 1}
    assert "written" in held and not (tmp_path / "results.json.partial").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["accuracy", "outer_loss"])
def test_a_figure_that_is_no_number_is_refused(value: float, name: str) -> None:
    check_figures(REPORTS, "it")
    wrong = {**REPORTS["meta_val"].metrics, name: Estimate(mean=value, half_width=0.1, count=500)}
    with pytest.raises(ExpectedFailure, match=rf"`{name}` of it is {value} on meta_val: .*Lower the learning rates"):
        check_figures({**REPORTS, "meta_val": ht.Report(metrics=wrong, seconds=1.0)}, "it")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (60.0, "1 min 0 s"), (252.0, "4 min 12 s"), (3599.7, "1 h 0 min"),
     (7325.0, "2 h 2 min")],
)  # fmt: skip
def test_a_time_is_in_the_units_of_its_size(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.fixture
def config() -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", ["seed=7"])


def test_results_are_of_the_best_step_and_the_times_of_their_parts(
    config: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.HydraConfig, "get", lambda: compose_job("seed=7"))
    results = train.results(
        parse(TrainSettings, config), TRAINED, REPORTS, {"none": {"meta_test": REPORTS["meta_val"]}}, 12.5
    )
    assert results["cpu_seconds"] == 12.5
    assert (results["num_outer_steps"], results["best_step"], results["seed"]) == (50, 40, 7)
    assert (results["training_minutes"], results["evaluation_minutes"]) == (2.5, 2.0)
    assert results["command"] == "scripts/train seed=7"
    metrics = results["metrics"]
    assert isinstance(metrics, dict) and list(metrics) == ["meta_train", "meta_val", "meta_test"]
    assert [metrics[split]["accuracy"]["mean"] for split in metrics] == [0.98765, 0.9, 0.5]
    baselines = results["baselines"]
    assert isinstance(baselines, dict) and baselines["none"]["meta_test"]["accuracy"]["mean"] == 0.9


def compose_job(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True).hydra


def test_the_closing_lines_are_of_the_best_step(config: DictConfig, capsys: pytest.CaptureFixture[str]) -> None:
    settings = parse(TrainSettings, config)
    baselines = {"none": {"meta_val": REPORTS["meta_test"]}}
    train.show(settings, TRAINED, REPORTS, baselines, {"a paper": "51 %"}, None, RunFolder(Path("here")))
    assert "unknown CPU seconds (a resumed run)" in capsys.readouterr().out
    train.show(settings, TRAINED, REPORTS, baselines, {"a paper": "51 %"}, 12.5, RunFolder(Path("here")))
    shown = capsys.readouterr().out
    assert "after 40 outer steps (best validation)" in shown
    assert "training 2 min 30 s (50 outer steps), evaluation 2 min 0 s" in shown
    assert "published, a paper: 51 %" in shown and "12 CPU seconds in all" in shown
    assert "everything is in here" in shown
    assert "hypertorch.load_hparams('here') loads the outer variables" in shown
    assert row(shown, "meta_val, none")[1] == "50.00 %" and row(shown, "meta_test")[1] == "50.00 %"


def test_a_sweep_is_told_the_best_validation_or_else_that_of_the_evaluation(config: DictConfig) -> None:
    experiment = build_experiment(config, parse(TrainSettings, config))
    assert train.merit(experiment, TRAINED, REPORTS) == 0.875
    unvalidated = ht.Trained(**{**vars(TRAINED), "best_value": None})
    assert train.merit(experiment, unvalidated, REPORTS) == 0.9
    for chosen, expected in ((("meta_train", "meta_test"), 0.98765), (("meta_test",), 0.5)):
        assert train.merit(experiment, unvalidated, {name: REPORTS[name] for name in chosen}) == expected
