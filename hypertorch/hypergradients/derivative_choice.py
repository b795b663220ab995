"""Whether the derivative of the inner gradient is taken by forward over reverse or by reverse over reverse."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Literal, TypeAlias

import torch

from hypertorch import tree
from hypertorch.compilation import NotCompilableError, compiler_errors
from hypertorch.cost import Cost
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.cross_check import disagreement
from hypertorch.hypergradients.kinds import kind_of
from hypertorch.hypergradients.step_by_step import Steps
from hypertorch.inner_loop import InnerLoop

_logger = logging.getLogger(__name__)

Derivative: TypeAlias = Literal["reverse", "mixed", "auto"]
"""How the inner gradient is differentiated: reverse over reverse, forward over reverse, or whichever wins."""

_REPEATS = 3  # the fastest of each counts
_HANDICAP = 1.1  # a mixed step holds no graph of a backward pass, and wins if it is not much slower
_wins: dict[Hashable, bool] = {}
_faults: dict[Hashable, str | None] = {}


def check_derivative(derivative: str) -> None:
    """Raises `ValueError` if this names no way to differentiate the inner gradient."""
    if derivative not in ("reverse", "mixed", "auto"):
        raise ValueError(
            f"`derivative` is {derivative!r}, which names no way to differentiate the inner gradient. Use 'reverse', "
            "'mixed' or 'auto'."
        )


def is_mixed(derivative: Derivative, loop: InnerLoop, make_steps: Callable[[bool], Steps], *, compiled: bool) -> bool:
    """Returns whether steps are differentiated in mixed mode: by name, or by a measurement of the first step.

    Mixed mode is compared with reverse over reverse first. That and the measurement are made once for problems of the
    same classes, dtypes and sizes, and leave no trace in the loop's costs. Problems with buffers go by reverse over
    reverse, whatever is asked for.

    Args:
        derivative: the name.
        loop: a loop of at least one step.
        make_steps: makes the steps, in mixed mode or not.
        compiled: whether they are compiled, which has a measurement of its own.

    Raises:
        IncompatibleBackendError: if mixed mode is asked for by name and is not possible, or would be wrong.
        NotCompilableError: the same of compiled steps, which may be right without compilation.
    """
    if derivative == "reverse" or loop.has_buffers:
        return False
    cost, losses = loop.cost, len(loop.inner_losses)
    loop.cost = Cost()
    try:
        state = make_steps(False).initial()
        sizes = tuple((tuple(value.shape), value.dtype) for value in state.tensors())
        key = (kind_of(loop.program().problem), sizes, loop.inner_eps, loop.device.type, compiled)
        if key not in _faults:
            _faults[key] = _fault(loop, make_steps, compiled=compiled, by_name=derivative == "mixed")
        fault = _faults[key]
        if derivative == "mixed":
            if fault is not None:
                failure = NotCompilableError if compiled else IncompatibleBackendError
                raise failure(
                    f"mixed mode is not possible here: {fault.removesuffix('.')}. Use `derivative='reverse'` or 'auto'."
                )
            return True
        if fault is not None:
            _logger.info("inner gradients differentiated by reverse over reverse: %s", fault)
            return False
        if key not in _wins:
            _wins[key] = _mixed_wins(loop, make_steps)
        return _wins[key]
    finally:
        loop.cost = cost
        del loop.inner_losses[losses:]


def _fault(loop: InnerLoop, make_steps: Callable[[bool], Steps], *, compiled: bool, by_name: bool) -> str | None:
    """Returns why mixed mode is out of the question, in words; None if it is not."""
    try:
        fault = disagreement(loop, make_steps(False), lambda: make_steps(True), runs=2 if compiled else 1)
    except compiler_errors() as error:
        if by_name:  # it may be possible without compilation
            raise
        return str(error)
    except IncompatibleBackendError as error:
        return str(error)
    except RuntimeError as error:
        # Reverse over reverse has run, or it would have raised the same. What forward mode lacks is on no list.
        return f"PyTorch says: {str(error).splitlines()[0]}"
    return (
        None
        if fault is None
        else (
            f"{fault} (the backward pass of some operations cannot be differentiated forwards, a determinant or a "
            "linear solve for example, and at a kink the two may take different sides)"
        )
    )


def _mixed_wins(loop: InnerLoop, make_steps: Callable[[bool], Steps]) -> bool:
    reverse, mixed = _seconds(loop, make_steps(False)), _seconds(loop, make_steps(True))
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
