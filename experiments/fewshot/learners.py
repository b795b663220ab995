"""The learner of a run, as it is trained and as it is judged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build, make
from experiments.common.configuration.settings import ProblemSettings
from experiments.fewshot.settings import FewShotSettings
from hypertorch.fewshot import Learner
from hypertorch.fewshot.learners.step_sizes import LOG_LR


def judged_learner(config: DictConfig, settings: ProblemSettings, own: FewShotSettings, **changes: Any) -> Learner:
    """Returns the learner as it is validated and evaluated; the same seed gives the same weights.

    Args:
        config: the configuration, for the groups `backbone`, `dynamics` and `learner`.
        settings: the plain settings of all experiments.
        own: the plain settings of few-shot learning.
        changes: arguments of the learner other than the configured; those that it does not take are left out.

    Raises:
        ExpectedFailure: if a setting has no effect on this learner, or a value that a class cannot work with.
    """
    steps = own.evaluation.num_steps
    return _build(config, settings, {**({} if steps is None else {"num_steps": steps}), **changes}, own.evaluation.lr)


def trained_learner(config: DictConfig, settings: ProblemSettings, own: FewShotSettings) -> Learner:
    """Returns the learner as it is trained: on episodes of `training.way` classes, where that is set.

    Args:
        config: the configuration, for the groups `backbone`, `dynamics` and `learner`.
        settings: the plain settings of all experiments.
        own: the plain settings of few-shot learning.
    """
    way = own.training.way
    return _build(config, settings, {} if way is None else {"way": way}, None)


def takes_dynamics(config: DictConfig) -> bool:
    """Returns whether the learner of a configuration has an inner loop of its own choice."""
    return (
        OmegaConf.select(config, "learner._target_") is None
        or "dynamics" in inspect.signature(make(config, "learner").func).parameters
    )


def check_same_hparams(training: Learner, evaluated: Learner) -> None:
    """Checks that what is learned can be judged, before anything is learned.

    Args:
        training: the learner as it is trained.
        evaluated: the learner as it is evaluated.

    Raises:
        ExpectedFailure: if they have other outer variables.
    """
    learned, judged = ({name: tuple(v.shape) for name, v in x.init_hparams().items()} for x in (training, evaluated))
    differing = [name for name in {**learned, **judged} if learned.get(name) != judged.get(name)]
    if differing:
        name = differing[0]
        raise ExpectedFailure(
            f"`training.way` or `evaluation.num_steps` gives the learner other outer variables than in training: "
            f"{name!r} has shape {learned.get(name)} there and {judged.get(name)} in the evaluation, so nothing "
            "could be judged. Leave that setting out (null), or choose a learner whose variables do not depend on it."
        )


def _build(config: DictConfig, settings: ProblemSettings, changes: Mapping[str, Any], lr: float | None) -> Learner:
    torch.manual_seed(settings.seed)
    network: nn.Module = build(config, "backbone")
    network = network.to(device=settings.device, dtype=settings.dtype)
    takes = inspect.signature(make(config, "learner").func).parameters
    passed: dict[str, Any] = {}
    if "num_steps" in changes and "num_steps" not in takes:
        raise ExpectedFailure(
            f"`evaluation.num_steps` is {changes['num_steps']}, but {make(config, 'learner').func.__name__} takes no "
            "inner steps: it would have no effect. Leave it out."
        )
    if "dynamics" in takes:
        passed["dynamics"] = build(config, "dynamics", instead={} if lr is None else {"lr": lr})
    elif lr is not None:
        raise ExpectedFailure(
            f"`evaluation.lr` is {lr}, but {make(config, 'learner').func.__name__} takes no inner steps: it would have "
            "no effect. Leave it out."
        )
    instead = {name: value for name, value in changes.items() if name in takes}
    learner: Learner = build(config, "learner", network, instead=instead, **passed)
    if lr is not None and any(name.split(".")[0] == LOG_LR for name in learner.init_hparams()):
        raise ExpectedFailure(
            f"`evaluation.lr` is {lr}, but {type(learner).__name__} learns its step sizes: it would have no effect. "
            "Leave it out, or learn none (`learner.learn_lr=null`, where the learner has it)."
        )
    return learner
