"""From a configuration to the outer loop of a training run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.outer_updates import build_outer_optimizer, build_scheduler, check_outer_updates
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.settings import TrainSettings
from experiments.common.runs.experiment import Experiment, check_repetitions
from experiments.common.runs.run_folder import RunFolder

# Settings of the outer loop that are no arguments of its class.
_LOOP_OWN = (
    "outer_loop.num_outer_steps",
    "outer_loop.schedule_length",
    "outer_loop.scheduler",
    "outer_loop.checkpoints",
    "outer_loop.snapshots",
)


def is_scheduled(config: DictConfig) -> bool:
    """Returns whether the scheduler of the outer optimizer depends on `outer_loop.schedule_length`."""
    return _scheduler(config, 1) != _scheduler(config, 2)


def _scheduler(config: DictConfig, length: int) -> Any:
    changed = OmegaConf.merge(config, {"outer_loop": {"schedule_length": length}})
    scheduler = OmegaConf.select(changed, "outer_loop.scheduler")
    return OmegaConf.to_container(scheduler, resolve=True) if OmegaConf.is_config(scheduler) else scheduler


def _idle(config: DictConfig, key: str) -> str | None:
    if not f"{key}.".startswith("outer_loop.schedule_length.") or is_scheduled(config):
        return None
    return (
        "the run has no learning-rate schedule that depends on its length: it would have no effect. Leave it out, or "
        "choose an outer_loop.scheduler with ${outer_loop.schedule_length} in it."
    )


TRAINING = Reads(
    settings=(TrainSettings,),
    blocks=(
        "experiment",
        "hypergradient",
        "outer_optimizer",
        "outer_loop",
        "outer_loop.scheduler",
        "outer_loop.checkpoints",
        "outer_loop.snapshots",
    ),
    idle=_idle,
    own=_LOOP_OWN,
)
"""What a training run reads, beside what its experiment reads."""


def build_outer_loop(
    config: DictConfig,
    settings: TrainSettings,
    experiment: Experiment,
    folder: RunFolder,
    ranks: ht.Ranks | None = None,
) -> ht.OuterLoop:
    """Returns the outer loop that learns from an experiment's problems and writes into the run's folder.

    Args:
        config: the configuration.
        settings: the plain settings, parsed from it.
        experiment: what to learn from and to validate on.
        folder: the run's folder.
        ranks: the processes that share the run; None for this one alone.

    Raises:
        ExpectedFailure: if a setting has a value that its class cannot work with.
    """
    loop = OmegaConf.create(
        {"outer_loop": {key: value for key, value in config.outer_loop.items() if f"outer_loop.{key}" not in _LOOP_OWN}}
    )
    check_outer_updates(config, settings.dtype)
    source, validated_on = experiment.training(), experiment.validation()
    check_repetitions(validated_on, settings.validation.num_episodes, "validation.num_episodes")
    # Before hours of training: what it is judged on is of the kind that it is validated on.
    check_repetitions(validated_on, settings.evaluation.num_episodes, "evaluation.num_episodes")
    return build(
        loop,
        "outer_loop",
        source,
        optimizer=build_outer_optimizer(config),
        backend=build(config, "hypergradient"),
        execution=replace(settings.execution.of(source), ranks=ranks),
        scheduler=build_scheduler(config),
        validation=ht.Validation(
            source=validated_on,
            every=settings.validation.every,
            num_episodes=settings.validation.num_episodes,
            metric=experiment.metric,
            mode=experiment.mode,
        ),
        loggers=[ht.JsonLinesLogger(folder.metrics), ht.TensorBoardLogger(folder.tensorboard)],
        checkpoints=build(config, "outer_loop.checkpoints", folder.checkpoints),
        snapshots=_snapshots(config, experiment),
    )


def _snapshots(config: DictConfig, experiment: Experiment) -> ht.Snapshots | None:
    block = config.outer_loop.snapshots
    if not isinstance(block, DictConfig):
        raise ExpectedFailure(
            f"`outer_loop.snapshots` is {block!r}, but it is a block with a number of outer steps. Write "
            "outer_loop.snapshots.every=100, or outer_loop.snapshots.every=null for none."
        )
    return None if block.every is None else build(config, "outer_loop.snapshots", pictures=experiment.pictures)
