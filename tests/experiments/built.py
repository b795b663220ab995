"""An experiment as the command builds it, without a run."""

from __future__ import annotations

from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments.common.runs.resolvers  # noqa: F401
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.runs.experiment import Experiment, build_experiment

E = TypeVar("E", bound=Experiment)


def built(kind: type[E], *words: str) -> E:
    """Returns the experiment that the words of a command line describe, which must be of this kind."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", list(words))
        experiment = build_experiment(config, parse(TrainSettings, config))
    assert isinstance(experiment, kind)
    return experiment
