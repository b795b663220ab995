"""The reverse sweep: cotangents go back through the segments of a run, from the outer loss to the initial state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.products import vjp
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.guards.replay import Replays
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict

Grads: TypeAlias = dict[str, Tensor | None]
"""A derivative in each variable, by name; None where there is no path to it."""

Cotangents: TypeAlias = list[Tensor | None]
"""The derivative of the outer loss in each tensor of an inner state, in the order of `InnerState.tensors()`."""


class Segment(NamedTuple):
    """Consecutive steps of a run that are differentiated together.

    Attributes:
        start: the first step.
        stop: one past the last.
        departure: the state before them.
        arrival: the state after them, where an earlier run has reached it; else None.
        connected: whether the departure has its graph into the variables, and is no constant to start from.
    """

    start: int
    stop: int
    departure: InnerState
    arrival: InnerState | None = None
    connected: bool = False


class PulledBack(NamedTuple):
    """What a segment adds to the hypergradient, and what it hands to the segment before it.

    Attributes:
        grads: the segment's part of the derivative in each variable.
        cotangents: the derivative in the state at the start of the segment.
        outer_loss: the sum of the terms of the outer loss in the segment, a scalar without a graph; None for none.
    """

    grads: Grads
    cotangents: Cotangents
    outer_loss: Tensor | None


class Differentiable(NamedTuple):
    """A segment that was run so that it can be differentiated.

    Attributes:
        end: the state after the segment; the segment's arrival itself where the steps were not run again.
        pull_back: from the cotangents of the end to what the segment adds. It is called once, and frees its graph.
    """

    end: InnerState
    pull_back: Callable[[Cotangents], PulledBack]


SegmentVjp: TypeAlias = Callable[[Segment], Differentiable]
"""How a segment is run and differentiated: with a graph of all its steps, in mixed mode, compiled, or undone."""


def sweep(
    loop: InnerLoop, variables: TensorDict, segments: Iterable[Segment], differentiate: SegmentVjp
) -> BackendResult:
    """Returns the derivative of the outer loss through the segments, direct term included.

    With `a_T = dE/ds_T`, for the segments from the last to the first:

        a_t += dE_t/ds_t,   grads += dE_t/dvariables + a_t dPhi_t/dvariables,   a_{t-1} = a_t dPhi_t/ds_{t-1}

    and the initialisation's part `a_0 dPhi_0/dvariables` from a last segment that is connected to the variables.

    Where a segment was run again, its end is compared with its arrival; the answers are read after the last one.

    Cost: one evaluation of the outer loss and its gradient, what `differentiate` costs for each segment, and one wait
    for the device.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        segments: of the run, from the last to the first; at least one, of no steps perhaps.
        differentiate: runs a segment and differentiates it.

    Raises:
        ReplayError: if a segment does not end at its arrival.

    References:
        Franceschi, Donini, Frasconi and Pontil (2017), Forward and reverse gradient-based hyperparameter optimization,
        algorithm 1.
    """
    last: InnerState | None = None
    replays: Replays | None = None
    for segment in segments:
        end, pull_back = differentiate(segment)
        if segment.arrival is not None and end is not segment.arrival:
            # Not before: one graph of all steps runs none twice.
            replays = replays or Replays(inner_eps=loop.inner_eps)
            replays.add(end, segment.arrival, segment.start, segment.stop)
        if last is None:
            # Kept without its graph, which would otherwise live as long as the sweep.
            last = end.detached()
            # dE/dvariables, and a_T = dE/ds_T.
            grads, cotangents, outer_loss = outer_part(loop, variables, last)
        # a_t dPhi_t/dvariables, and a_{t-1} = a_t dPhi_t/ds_{t-1}; both with the terms dE_t.
        part, cotangents, term = pull_back(cotangents)
        grads = tree.accumulate(grads, part)
        outer_loss = outer_loss if term is None else outer_loss + term
        # Not to be held while the segment before is run.
        del segment, end, pull_back, part
    assert last is not None
    if replays is not None:
        replays.check()
    return BackendResult(grads=grads, outer_loss=outer_loss, state=last)


def outer_part(loop: InnerLoop, variables: TensorDict, last: InnerState) -> tuple[Grads, Cotangents, Tensor]:
    """Returns the direct term `dE/dvariables`, the cotangents `a_T = dE/ds_T` of the last state, and `E`.

    Cost: one evaluation of the outer loss and its gradient.
    """
    # Cut from the run, so that the outer loss is differentiated on its own graph, whatever the segments are.
    leaves = loop.leaves(last)
    with torch.enable_grad():
        outer_loss = loop.outer(leaves.params, variables)
    grads, cotangents = pull_back([outer_loss], [torch.ones_like(outer_loss)], leaves, variables)
    return grads, cotangents, outer_loss.detach()


def pull_back(
    outputs: list[Tensor], cotangents: Cotangents, leaves: InnerState, variables: TensorDict
) -> tuple[Grads, Cotangents]:
    """Returns the product of the cotangents with the Jacobian of `outputs`, in the variables and in a state.

    Args:
        outputs: tensors computed from `leaves` and `variables`.
        cotangents: one per output; None where the output plays no role.
        leaves: the state, as `InnerLoop.leaves` makes it.
        variables: hyperparameters and context, as leaves.

    Returns:
        The part of each variable, by name, and the cotangents of the state's tensors, in order.
    """
    # One vjp for both: two would go through the graph twice, and have to keep it. The state's tensors are numbered, so
    # that names of the two cannot clash.
    joint = vjp(outputs, cotangents, {**variables, **dict(enumerate(leaves.tensors()))})
    found = list(joint.values())
    return dict(zip(variables, found, strict=False)), found[len(variables) :]
