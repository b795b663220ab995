"""Whether the derivative of the inner gradient is taken by forward over reverse or by reverse over reverse."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Literal, TypeAlias

import torch

from hypertorch import tree
from hypertorch.compilation import compiler_errors
from hypertorch.cost import Cost
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.compiled_steps import program_key
from hypertorch.hypergradients.step_by_step import Steps
from hypertorch.inner_loop import InnerLoop

_logger = logging.getLogger(__name__)

Derivative: TypeAlias = Literal["reverse", "mixed", "auto"]
"""How the inner gradient is differentiated: reverse over reverse, forward over reverse, or whichever wins."""

_REPEATS = 3  # the fastest of each counts
_HANDICAP = 1.1  # a mixed step holds no graph of a backward pass, and wins if it is not much slower
_measured: dict[Hashable, bool] = {}


def check_derivative(derivative: str) -> None:
    """Raises `ValueError` if this names no way to differentiate the inner gradient."""
    if derivative not in ("reverse", "mixed", "auto"):
        raise ValueError(
            f"`derivative` is {derivative!r}, which names no way to differentiate the inner gradient. Use 'reverse', "
            "'mixed' or 'auto'."
        )


def is_mixed(derivative: Derivative, loop: InnerLoop, make_steps: Callable[[bool], Steps], *, compiled: bool) -> bool:
    """Returns whether steps are differentiated in mixed mode: by name, or by a measurement of the first step.

    The measurement is made once for problems of the same classes, dtypes and sizes, and leaves no trace in the loop's
    costs. Where an operation has no forward derivative, reverse over reverse is taken.

    Args:
        derivative: the name.
        loop: a loop of at least one step.
        make_steps: makes the steps, in mixed mode or not.
        compiled: whether they are compiled, which has a measurement of its own.
    """
    if derivative != "auto":
        return derivative == "mixed"
    if loop.has_buffers:
        return False
    cost, losses = loop.cost, len(loop.inner_losses)
    loop.cost = Cost()
    try:
        state = make_steps(False).initial()
        sizes = tuple((tuple(value.shape), value.dtype) for value in state.tensors())
        key = (program_key(loop.program()), sizes, loop.device.type, compiled)
        if key not in _measured:
            _measured[key] = _mixed_wins(loop, make_steps)
        return _measured[key]
    finally:
        loop.cost = cost
        del loop.inner_losses[losses:]


def _mixed_wins(loop: InnerLoop, make_steps: Callable[[bool], Steps]) -> bool:
    reverse = _seconds(loop, make_steps(False))
    try:
        mixed = _seconds(loop, make_steps(True))
    except (IncompatibleBackendError, RuntimeError, *compiler_errors()) as error:  # reverse over reverse has run
        _logger.info("inner gradients differentiated by reverse over reverse: %s", error)
        return False
    _logger.info("a step's vjp took %.2f ms by reverse over reverse, %.2f ms mixed", 1e3 * reverse, 1e3 * mixed)
    return mixed <= _HANDICAP * reverse


def _seconds(loop: InnerLoop, steps: Steps) -> float:
    """Returns the time of the first step's vjp, after a warm-up."""
    departure = steps.initial()
    arrival = steps.advance(departure, 0)
    cotangents = [torch.ones_like(value) if tree.is_differentiable(value) else None for value in arrival.tensors()]
    best = float("inf")
    for run in range(_REPEATS + 2):
        _synchronize(loop.device)
        start = time.perf_counter()
        steps.pull_back(departure, cotangents, 0, arrival)
        _synchronize(loop.device)
        if run >= 2:
            best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
