"""The pictures of a study say nothing while they are drawn, and leave the process as it was."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import matplotlib as mpl
import optuna
import pytest

from hydra_plugins.hypertorch_search._pictures import draw_study


def test_nothing_is_said_amid_the_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    # Choices that look like numbers, and settings of one value.
    study.optimize(
        lambda trial: (
            float(trial.suggest_categorical("width", ["16", "64"]))
            * (trial.suggest_float("lr", 0.1, 1) + trial.suggest_int("depth", 2, 2))
        ),
        n_trials=3,
    )
    loggers, before = logging.getLogger("matplotlib"), dict(mpl.rcParams)
    level, verbosity = loggers.level, optuna.logging.get_verbosity()
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("always")
        drawn = draw_study(study, ["validation"], tmp_path)
        assert [path.name for path in drawn] == [
            "history.png",
            "importance.png",
            "slices.png",
            "parallel_coordinates.png",
        ]
    assert not caplog.records and not recwarn.list
    assert (loggers.level, optuna.logging.get_verbosity(), dict(mpl.rcParams)) == (level, verbosity, before)
