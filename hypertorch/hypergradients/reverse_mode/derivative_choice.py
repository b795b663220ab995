"""Whether the derivative of the inner gradient is taken by forward over reverse or by reverse over reverse."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.guards.cross_check import Reference, case_of, fault_of, forget, vjp_faults
from hypertorch.hypergradients.guards.replay import check_replay
from hypertorch.hypergradients.reverse_mode.compiled.compilation import compiler_errors
from hypertorch.hypergradients.reverse_mode.compiled.costs import synchronize
from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError
from hypertorch.hypergradients.reverse_mode.steps import Steps
from hypertorch.hypergradients.reverse_mode.sweep import Segment
from hypertorch.inner import memo
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict

_logger = logging.getLogger(__name__)

Derivative: TypeAlias = Literal["reverse", "mixed", "auto"]
"""How the inner gradient is differentiated: reverse over reverse, forward over reverse, or whichever wins."""

_REPEATS = 3  # the fastest of each counts
_HANDICAP = 1.1  # a mixed step holds no graph of a backward pass, and wins if it is not much slower
DERIVATIVE = "whether mixed mode is the faster"

StepsOf: TypeAlias = Callable[[InnerLoop, TensorDict, bool], Steps]
"""`(loop, variables, mixed) -> steps`."""


def is_mixed(
    derivative: Derivative, loop: InnerLoop, variables: TensorDict, steps_of: StepsOf, *, compiled: bool
) -> bool:
    """Returns whether steps are differentiated in mixed mode: by name, or by a measurement of the first step.

    Mixed mode is compared with reverse over reverse first. That and the measurement are made once for every kind of
    problem, and leave no trace in the loop's costs. Problems with buffers go by reverse over reverse, whatever is asked
    for.

    Args:
        derivative: the name.
        loop: a loop of at least one step.
        variables: hyperparameters and context, as leaves.
        steps_of: makes the steps of a loop, in mixed mode or not.
        compiled: whether they are compiled, which has a measurement of its own.

    Raises:
        IncompatibleBackendError: if mixed mode is asked for by name and is not possible, or would be wrong.
        NotCompilableError: the same of compiled steps, which may be right without compilation.
    """
    if loop.has_buffers:
        return False
    case = case_of(loop, variables)
    way = "mixed mode, compiled" if compiled else "mixed mode"

    def faults(reference: Reference) -> Iterator[str]:
        try:
            yield from _faults(reference, steps_of, compiled=compiled)
        except compiler_errors() as error:
            if derivative == "mixed":  # it may be possible without compilation
                raise
            yield str(error).removesuffix(".")

    fault = fault_of(loop, variables, case, way, faults)
    if derivative == "mixed":
        if fault is not None:
            # A refusal is found out again: the user may have followed its advice.
            forget(case, [way])
            failure = NotCompilableError if compiled else IncompatibleBackendError
            raise failure(f"mixed mode is not possible here: {fault.reason}. Use `derivative='reverse'` or 'auto'.")
        return True
    if fault is not None:
        return False
    # What is measured is no part of the run.
    own = loop.uncounted()
    return memo.recall(
        DERIVATIVE, (case, compiled), lambda: _mixed_wins(own, lambda mixed: steps_of(own, variables, mixed))
    )


def _faults(reference: Reference, steps_of: StepsOf, *, compiled: bool) -> Iterator[str]:
    """Yields what is wrong with mixed mode at a step."""
    assert reference.products is not None
    departure, products = reference.departure, reference.products
    steps = steps_of(reference.loop, reference.variables, True)
    steps.initial()
    steps.advance(departure, reference.step)
    for _ in range(2 if compiled else 1):  # the first vjp of compiled steps is not compiled
        segment = Segment(reference.step, reference.step + 1, departure, products.outputs)
        run = steps.vjp(segment)
        check_replay(run.end, products.outputs, *segment[:2], inner_eps=reference.loop.inner_eps)
        found = run.pull_back(list(products.cotangents))
    yield from vjp_faults(products, found.grads, found.cotangents, departure)


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
    # Two warm-ups: compiled steps differentiate the run's last one, which they
    # meet first, without compilation, and compile at the next.
    for run in range(_REPEATS + 2):
        synchronize(loop.device)
        start = time.perf_counter()
        steps.vjp(Segment(0, 1, departure, arrival)).pull_back(cotangents)
        synchronize(loop.device)
        if run >= 2:
            best = min(best, time.perf_counter() - start)
    return best
