"""An experiment as the command builds it, without a run."""

from __future__ import annotations

from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments.common.resolvers  # noqa: F401
from experiments.common.config_errors import CONFIGS
from experiments.common.experiment import Experiment, build_experiment
from experiments.common.settings import TrainSettings
from experiments.common.typed_settings import parse

E = TypeVar("E", bound=Experiment)


def built(kind: type[E], *words: str) -> E:
    """Returns the experiment that the words of a command line describe, which must be of this kind."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", list(words))
        experiment = build_experiment(config, parse(TrainSettings, config))
    assert isinstance(experiment, kind)
    return experiment
