"""The optimizer of the outer variables and its scheduler, from a configuration, and whether they can take steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from experiments.common.commands.config_errors import one_line
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import make, spelt_arguments


def build_outer_optimizer(config: DictConfig) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    """Returns what makes the outer optimizer, tried on one number so that a wrong setting shows at once.

    Raises:
        ExpectedFailure: if the optimizer refuses its settings.
    """
    factory = make(config, "outer_optimizer")
    # To PyTorch true is the number 1.
    if isinstance(OmegaConf.select(config, "outer_optimizer.lr"), bool):
        raise ExpectedFailure(
            f"`outer_optimizer.lr` is {config.outer_optimizer.lr}, but it is a step size, so a number is needed. Write "
            "for example outer_optimizer.lr=0.001."
        )
    try:
        factory([torch.zeros(1, requires_grad=True)])
    except (TypeError, ValueError) as error:
        raise ExpectedFailure(
            f"`outer_optimizer` is {factory.func.__name__}({spelt_arguments(factory)}), which PyTorch refuses: "
            f"{error}. Correct that setting."
        ) from error
    return factory


def build_scheduler(
    config: DictConfig,
) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None:
    """Returns what makes the learning-rate scheduler; None if there is none."""
    return None if OmegaConf.select(config, "outer_loop.scheduler") is None else make(config, "outer_loop.scheduler")


def check_outer_updates(config: DictConfig, dtype: torch.dtype) -> None:
    """Checks that the outer optimizer and its scheduler can take steps: PyTorch refuses some settings there only.

    Raises:
        ExpectedFailure: naming the setting that PyTorch refuses, or that leaves the range of the run's numbers.
    """
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
