"""From a configuration to the objects of a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

import hypertorch as ht
from experiments.common.building import build, make, spelt_arguments
from experiments.common.config_errors import CONFIGS, one_line
from experiments.common.failures import ExpectedFailure
from experiments.common.reads import Reads
from experiments.common.run_folder import RunFolder
from experiments.common.settings import SPLITS, chosen_device, chosen_dtype, chosen_inner_dtype
from hypertorch.fewshot import EpisodeSource, Learner
from hypertorch.fewshot.learners.step_sizes import LOG_LR

# Settings of the outer loop that are no arguments of its class.
_LOOP_OWN = ("outer_loop.num_outer_steps", "outer_loop.scheduler", "outer_loop.checkpoints")
# Streams of episodes: no two of one run are the same, and neither are those of runs with different seeds.
_STREAMS = ("train", "validate", *(f"evaluate {split}" for split in SPLITS))


def _takes_dynamics(config: DictConfig) -> bool:
    return (
        OmegaConf.select(config, "learner._target_") is None
        or "dynamics" in inspect.signature(make(config, "learner").func).parameters
    )


TRAINING = Reads(
    main_config=CONFIGS / "train.yaml",
    blocks=(
        "dataset",
        "episodes",
        "training.augmentation",
        "backbone",
        "dynamics",
        "learner",
        "hypergradient",
        "outer_optimizer",
        "outer_loop",
        "outer_loop.scheduler",
        "outer_loop.checkpoints",
    ),
    optional={"dynamics": _takes_dynamics},
    own=_LOOP_OWN,
    entries=("task.metric", "task.mode"),
    tables=("task", "learner_needs", "run_lengths"),
)
"""What a training run reads."""


def build_outer_optimizer(config: DictConfig) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    """Returns what makes the outer optimizer, tried on one number so that a wrong setting shows at once.

    Raises:
        ExpectedFailure: if the optimizer refuses its settings.
    """
    factory = make(config, "outer_optimizer")
    try:
        factory([torch.zeros(1, requires_grad=True)])
    except (TypeError, ValueError) as error:
        raise ExpectedFailure(
            f"`outer_optimizer` is {factory.func.__name__}({spelt_arguments(factory)}), which PyTorch refuses: "
            f"{error}. Correct that setting."
        ) from error
    return factory


def check_outer_updates(config: DictConfig) -> None:
    """Checks that the outer optimizer and its scheduler can take steps: PyTorch refuses some settings there only.

    Raises:
        ExpectedFailure: naming the setting that PyTorch refuses, or that leaves the range of the run's numbers.
    """
    dtype = chosen_dtype(config)
    blocks = {"outer_optimizer": build_outer_optimizer(config), "outer_loop.scheduler": build_scheduler(config)}
    given = {
        f"{block}.{name}": value
        for block, factory in blocks.items()
        if isinstance(factory, partial)
        for name, value in factory.keywords.items()
    }
    try:
        number = _moved(blocks["outer_optimizer"], blocks["outer_loop.scheduler"], dtype)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = f"which PyTorch refuses in the first steps ({one_line(error)})"
    else:
        if math.isfinite(number):
            return
        reason = f"with which the first steps lead from 0 to {number}"
    too_large = [
        key
        for key, value in given.items()
        if isinstance(value, (int, float)) and not abs(value) <= torch.finfo(dtype).max
    ]
    keys = too_large or list(given)
    raise ExpectedFailure(
        f"{', '.join(f'`{key}` is {given[key]!r}' for key in keys)}, {reason}: the run computes in "
        f"{str(dtype).removeprefix('torch.')}, up to {torch.finfo(dtype).max:.2g}. Give {keys[0]}=... another value."
    )


def _moved(optimizer: Any, scheduler: Any, dtype: torch.dtype) -> float:
    """Returns where a few steps along a gradient of 1 lead from 0."""
    variable = torch.zeros(1, dtype=dtype, requires_grad=True)
    made = optimizer([variable])
    schedule = None if scheduler is None else scheduler(made)
    for _ in range(3):  # a momentum acts from the second step on, a schedule too
        variable.grad = torch.ones_like(variable)
        made.step()
        if schedule is not None:
            schedule.step()
    return float(variable.detach())


def build_scheduler(
    config: DictConfig,
) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None:
    """Returns what makes the learning-rate scheduler; None if there is none."""
    return None if OmegaConf.select(config, "outer_loop.scheduler") is None else make(config, "outer_loop.scheduler")


def build_learner(config: DictConfig, **changes: Any) -> Learner:
    """Returns the learner as it is evaluated, on the chosen device; the same seed gives the same weights.

    Args:
        config: the configuration.
        changes: arguments of the learner other than the configured; those that it does not take are left out.
    """
    steps = config.evaluation.num_steps
    # Runs of earlier versions do not have this setting.
    lr = config.evaluation.get("lr")
    return _build_learner(config, {**({} if steps is None else {"num_steps": steps}), **changes}, lr)


def build_training_learner(config: DictConfig) -> Learner:
    """Returns the learner as it is trained: on episodes of `training.way` classes, where that is set."""
    return _build_learner(config, {} if config.training.way is None else {"way": config.training.way}, None)


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


def _build_learner(config: DictConfig, changes: Mapping[str, Any], lr: float | None) -> Learner:
    torch.manual_seed(config.seed)
    network: nn.Module = build(config, "backbone")
    network = network.to(device=chosen_device(config), dtype=chosen_dtype(config))
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


def on_episodes(config: DictConfig, learner: Learner, episodes: EpisodeSource) -> ht.ProblemSource:
    """Returns a learner's problems on a stream of episodes, their tasks run as the configuration says."""
    # Runs of earlier versions do not have these settings.
    route, chunk = config.get("task_route", "auto"), config.get("task_chunk")
    return learner.on(episodes, task_route=route, task_chunk=chunk, inner_dtype=chosen_inner_dtype(config))


@dataclass(frozen=True, kw_only=True)
class EpisodeStreams:
    """Makes the episodes of a run: for training, for validation, and for the evaluation of each split."""

    config: DictConfig

    def training(self) -> EpisodeSource:
        """Returns the episodes to learn from."""
        return self._stream("train", self.config.train_split)

    def validation(self) -> EpisodeSource:
        """Returns the episodes that choose the best outer variables."""
        return self._stream("validate", "meta_val")

    def evaluation(self, split: str, seed: int | None = None) -> EpisodeSource:
        """Returns the episodes of the final evaluation on a split.

        Args:
            split: one of `SPLITS`.
            seed: chooses other episodes; None for those that belong to the run.
        """
        return self._stream(f"evaluate {split}", split, seed)

    def _stream(self, purpose: str, split: str, seed: int | None = None) -> EpisodeSource:
        config = self.config
        number = len(_STREAMS) * (config.seed if seed is None else seed) + _STREAMS.index(purpose)
        passed: dict[str, Any] = {"seed": number, "dtype": chosen_dtype(config)}
        own: dict[str, int] = {}
        if purpose == "train":
            own = {name: config.training[name] for name in ("way", "shot") if config.training[name] is not None}
            if config.training.augmentation is not None:
                passed["augmentation"] = build(config, "training.augmentation")
        else:
            own = {"num_queries": config.evaluation.num_queries}
        if config.dataset is None:
            return build(config, "episodes", instead=own, device=chosen_device(config), **passed)
        images = build(config, "dataset", split=split).to(chosen_device(config))
        try:
            return build(config, "episodes", images, instead=own, **passed)
        except ValueError as error:
            # The class knows its arguments only, not that some come from settings of another name here.
            where, group = ("training", "training") if purpose == "train" else ("the evaluation", "evaluation")
            hint = "".join(
                f" In {where} `{name}` is the setting {group}.{name}={value}." for name, value in own.items()
            )
            task = purpose.split(maxsplit=1)[0]
            raise ExpectedFailure(f"the episodes of {split}, to {task} on: {error}{hint}") from error


def build_outer_loop(
    config: DictConfig, source: ht.ProblemSource, validation: ht.ProblemSource, folder: RunFolder
) -> ht.OuterLoop:
    """Returns the outer loop that trains on the problems of a source and writes into the run's folder.

    Args:
        config: the configuration.
        source: where the problems to learn from come from.
        validation: where the problems come from by which the best outer variables are chosen.
        folder: the run's folder.
    """
    check_outer_updates(config)
    settings = OmegaConf.create(
        {"outer_loop": {key: value for key, value in config.outer_loop.items() if f"outer_loop.{key}" not in _LOOP_OWN}}
    )
    return build(
        settings,
        "outer_loop",
        source,
        optimizer=build_outer_optimizer(config),
        backend=build(config, "hypergradient"),
        scheduler=build_scheduler(config),
        validation=ht.Validation(
            source=validation,
            every=config.validation.every,
            num_episodes=config.validation.num_episodes,
            metric=config.task.metric,
            mode=config.task.mode,
        ),
        loggers=[ht.JsonLinesLogger(folder.metrics), ht.TensorBoardLogger(folder.tensorboard)],
        checkpoints=build(config, "outer_loop.checkpoints", folder.checkpoints),
    )
