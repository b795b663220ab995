"""Metasmoothness as a command: each variant is measured as its settings say, and what changes nothing is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import experiments.common.runs.resolvers  # noqa: F401
import hypertorch as ht
from experiments import metasmoothness
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.runs.experiment import build_experiment
from tests.experiments.commands import Command

SMALL = (
    "experiment.sizes.pool=24", "experiment.sizes.validation=20", "experiment.num_copied=2", "experiment.hidden=4",
    "experiment.batch_size=9", "experiment.num_steps=5", "num_problems=2", "step_size=0.5", "dtype=float64",
    "paths.run_dir=run",
)  # fmt: skip


def test_variants_are_measured_and_drawn(command: Command, tmp_path: Path) -> None:
    code, error = command(*SMALL, "only=[rough]", '+variants.rough=["dynamics.eps=0.01"]', module=metasmoothness)
    assert code == 0, error
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["as it is", "as it is", "rough", "rough"]
    assert (tmp_path / "run/metasmoothness.png").stat().st_size > 5000
    with (tmp_path / "run/metasmoothness.csv").open(newline="") as file:
        assert [float(row["smoothness"]) for row in csv.DictReader(file)] == [row["smoothness"] for row in rows]
    # The last row, by the library alone.
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["experiment=data_selection", *SMALL[:6], "dtype=float64", "dynamics.eps=0.01"])
    source = build_experiment(config, parse(TrainSettings, config)).training()
    found = ht.metasmoothness(source.at(1), source.init_hparams(), step_size=0.5, outer_step=1)
    assert rows[-1]["smoothness"] == pytest.approx(found.smoothness, rel=1e-9)
    assert rows[-1]["error"] == pytest.approx(found.error, rel=1e-9)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ('["dynamics.nonsense=1"]', "`variants.wrong` is ['dynamics.nonsense=1'], which cannot be set"),
        ('["experiment.norm=nonsense"]', "`experiment.norm` is 'nonsense'"),
        ('["experiment.num_copied=100"]', "`experiment.num_copied` is 100"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(variant: str, message: str, command: Command, tmp_path: Path) -> None:
    code, error = command(*SMALL, "only=[wrong]", f"+variants.wrong={variant}", module=metasmoothness)
    assert code == 1 and message in error
    assert not (tmp_path / "run/results.json").exists()


def test_an_unknown_variant_is_refused(command: Command) -> None:
    code, error = command(*SMALL, "only=[nonsense]", module=metasmoothness)
    assert code == 1 and "`only` names 'nonsense', which is not among the variants" in error
