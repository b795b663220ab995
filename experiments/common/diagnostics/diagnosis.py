"""What the commands that look at an experiment's hypergradients share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.reads import Reads, check_settings_are_read
from experiments.common.configuration.settings import ProblemSettings
from experiments.common.configuration.typed_settings import setting
from experiments.common.results.reporting import versions
from experiments.common.runs.experiment import build_experiment, experiment_class
from experiments.common.runs.run_folder import command

_OF_TRAINING = ("hypergradient", "outer_optimizer", "outer_loop", "validation", "evaluation", "pictures")


def never(config: DictConfig, key: str) -> bool:
    """Returns a switch that can only be off.

    Raises:
        ExpectedFailure: if it is anything else.
    """
    value = OmegaConf.select(config, key)
    if value is not False:
        raise ExpectedFailure(
            f"`{key}` is {value!r}, but this command has nothing to go on with: it writes its results at the end. "
            "Leave it out."
        )
    return False


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings(ProblemSettings):
    """What every command here reads beside what the experiment reads.

    Args:
        resume: nothing is resumed.
    """

    resume: bool = setting(never)


def _idle(config: DictConfig, key: str) -> str | None:  # noqa: ARG001
    if key.split(".", maxsplit=1)[0] in _OF_TRAINING:
        return "this command trains and evaluates nothing: it would have no effect. Leave it out."
    return None


def check_reads(config: DictConfig, own: Reads) -> None:
    """Checks that everything in the configuration is read, by the command, its experiment, or what both share.

    Args:
        config: the configuration.
        own: what the command itself reads.

    Raises:
        ExpectedFailure: naming the setting that is not.
    """
    shared = Reads(blocks=("experiment",), idle=_idle, tables=_OF_TRAINING)
    check_settings_are_read(config, own | shared | experiment_class(config).READS)


def training_problem(config: DictConfig, settings: ProblemSettings, num_steps: int | None = None) -> ht.BilevelProblem:
    """Returns the problem of an experiment's first outer step.

    Args:
        config: the configuration.
        settings: the plain settings, parsed from it.
        num_steps: the horizon (unit: steps); None for that of the experiment.
    """
    problem = build_experiment(config, settings).training().at(0)
    return problem if num_steps is None else replace(problem, num_steps=num_steps)


def build_backends(config: DictConfig, only: list[str] | None) -> dict[str, ht.Hypergradient]:
    """Returns the configured backends, or those that `only` names, by name.

    Args:
        config: the configuration.
        only: names of those wanted; None for all.

    Raises:
        ExpectedFailure: if `only` names others.
    """
    names = [str(name) for name in config.backends]
    chosen = names if only is None else only
    for name in chosen:
        if name not in names:
            raise ExpectedFailure(
                f"`only` names {name!r}, which is not among the backends. Choose from: {', '.join(names)}."
            )
    return {name: build(config, f"backends.{name}") for name in chosen}


def run_description() -> dict[str, Any]:
    """Returns what determines the numbers of a run, for results.json."""
    job = HydraConfig.get()
    return {
        "command": command(f"python experiments/{job.job.name}.py", job.overrides.task),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
    }
