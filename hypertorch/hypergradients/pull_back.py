"""One piece of the inner loop at a time in reverse mode: cotangents in at its end, cotangents out at its start."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.derivatives import vjp
from hypertorch.hypergradients.replay import check_replay
from hypertorch.inner_loop import InnerLoop
from hypertorch.inner_state import InnerState
from hypertorch.types import TensorDict

Grads: TypeAlias = dict[str, Tensor | None]
"""A derivative in each variable, by name; None where there is no path to it."""

Cotangents: TypeAlias = list[Tensor | None]
"""The derivative of the outer loss in each tensor of an inner state, in the order of `InnerState.tensors()`."""


class PulledBack(NamedTuple):
    """What a piece of the run adds to the hypergradient, and what it hands to the piece before it.

    Attributes:
        grads: this piece's part of the derivative in each variable.
        cotangents: the derivative in the state at the start of the piece, through this piece and all after it.
        outer_loss: the terms of the outer loss in this piece, a scalar without a graph.
    """

    grads: Grads
    cotangents: Cotangents
    outer_loss: Tensor


class Segment(NamedTuple):
    """Consecutive steps run with a graph.

    Attributes:
        start: the first step.
        stop: one past the last.
        leaves: the state before them, which a derivative can be taken in.
        end: the state after them, with the graph.
        step_losses: the sum of the terms of the outer loss at these steps, a scalar with the graph.
    """

    start: int
    stop: int
    leaves: InnerState
    end: InnerState
    step_losses: Tensor


def last_term(loop: InnerLoop, variables: TensorDict, last: InnerState) -> PulledBack:
    """Returns the direct term `dE/dvariables`, the cotangents `a_T = dE/ds_T` of the last state, and `E`.

    Cost: one evaluation of the outer loss and its gradient.
    """
    leaves = loop.leaves(last)
    with torch.enable_grad():
        outer_loss = loop.outer_loss(leaves.params, variables)
    grads, cotangents = pull_back([outer_loss], [torch.ones_like(outer_loss)], leaves, variables)
    return PulledBack(grads, cotangents, outer_loss.detach())


def run_segment(loop: InnerLoop, variables: TensorDict, departure: InnerState, start: int, stop: int) -> Segment:
    """Returns steps `start .. stop - 1` run with a graph from the values of `departure`.

    Cost: `stop - start` steps; memory of their graphs.
    """
    leaves = loop.leaves(departure)
    with torch.enable_grad():
        state = leaves
        step_losses = torch.zeros((), device=loop.device)
        for step in range(start, stop):
            state = loop.step(state, variables, step)
            if loop.has_step_loss:
                step_losses = step_losses + loop.step_loss(state.params, variables, step)
    loop.cost.graph_steps = max(loop.cost.graph_steps, stop - start)
    return Segment(start, stop, leaves, state, step_losses)


def pull_back_segment(loop: InnerLoop, variables: TensorDict, segment: Segment, cotangents: Cotangents) -> PulledBack:
    """Returns what a segment adds to the hypergradient, given the cotangents of its end. Its graph is freed.

    With terms `E_t` of the outer loss at these steps, for t going back from the end:

        a_t += dE_t/ds_t,   grads += dE_t/dvariables + a_t dPhi_t/dvariables,   a_{t-1} = a_t dPhi_t/ds_{t-1}

    Cost: a vjp for every step of the segment.
    """
    loop.cost.vjps += segment.stop - segment.start
    outputs = [*segment.end.tensors(), segment.step_losses]
    seeds = [*cotangents, torch.ones_like(segment.step_losses)]
    grads, before = pull_back(outputs, seeds, segment.leaves, variables)
    return PulledBack(grads, before, segment.step_losses.detach())


def pull_back_steps(
    loop: InnerLoop,
    variables: TensorDict,
    departure: InnerState,
    cotangents: Cotangents,
    start: int,
    stop: int,
    *,
    arrival: InnerState | None = None,
) -> PulledBack:
    """Runs steps `start .. stop - 1` with a graph and pulls the cotangents of their end back to their start.

    Cost: `stop - start` steps and as many vjps; memory of their graphs.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        departure: the state before step `start`; only its values are used.
        cotangents: of the state after step `stop - 1`.
        start: the first step.
        stop: one past the last.
        arrival: the state after step `stop - 1` as an earlier run had it, to compare with; None to compare nothing.

    Raises:
        ReplayError: if the steps do not arrive at `arrival`.
    """
    segment = run_segment(loop, variables, departure, start, stop)
    if arrival is not None:
        check_replay(segment.end, arrival, start, stop, inner_eps=loop.inner_eps)
    return pull_back_segment(loop, variables, segment, cotangents)


def pull_back_initial(loop: InnerLoop, variables: TensorDict, cotangents: Cotangents) -> Grads:
    """Returns the initialisation's part of the hypergradient, `a_0 dPhi_0/dvariables`.

    Cost: one evaluation of the initial state and one vjp of it.
    """
    with torch.enable_grad():
        initial = loop.initial(variables)
    return vjp(initial.tensors(), cotangents, variables)


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
    # Names of the two cannot clash: the state's are numbered.
    numbered = {f"\0{position}": tensor for position, tensor in enumerate(leaves.tensors())}
    joint = vjp(outputs, cotangents, {**variables, **numbered})
    return {name: joint[name] for name in variables}, [joint[name] for name in numbered]


def accumulate(total: Grads, part: Grads) -> Grads:
    """Returns the sum of two derivatives in the same variables."""
    return {name: tree.add_optional(value, part[name]) for name, value in total.items()}
