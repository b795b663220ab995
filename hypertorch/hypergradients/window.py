"""The last steps of the inner loop differentiated on one graph, and the steps before them run without one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.derivatives import vjp
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.pull_back import Grads, accumulate
from hypertorch.inner_loop import InnerLoop
from hypertorch.inner_loss import GradientRoute
from hypertorch.inner_state import InnerState
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowStart:
    """Where a window of the inner loop begins.

    Attributes:
        step: the first step of the window.
        state: the inner state before it.
        outer_loss: the terms of the outer loss at the steps before the window, a scalar.
        grads: their direct derivative in each variable; None where there is none.
    """

    step: int
    state: InnerState
    outer_loss: Tensor
    grads: Grads


def whole_window(loop: InnerLoop, variables: TensorDict) -> WindowStart:
    """Returns the start of the window that is the whole run: the initial state, with its graph into the variables."""
    with torch.enable_grad():
        state = loop.initial(variables)
    return WindowStart(
        step=0, state=state, outer_loss=torch.zeros((), device=loop.device), grads=dict.fromkeys(variables)
    )


def window_from(loop: InnerLoop, variables: TensorDict, step: int) -> WindowStart:
    """Returns the start of a window at `step`: the state before it as a constant, from a run without a graph.

    Terms of the outer loss at the steps before give their direct derivative `dE_t/dvariables` at constant params.

    Cost: `step` steps; memory of one state.
    """
    constants = tree.detach(variables)
    outer_loss = torch.zeros((), device=loop.device)
    grads: Grads = dict.fromkeys(variables)
    with torch.no_grad():
        state = loop.initial(constants)
    for earlier in range(step):
        with torch.no_grad():
            state = loop.step(state, constants, earlier)
        if loop.has_step_loss:
            with torch.enable_grad():
                term = loop.step_loss(state.params, variables, earlier)
            grads = accumulate(grads, vjp([term], [torch.ones_like(term)], variables))
            outer_loss = outer_loss + term.detach()
    return WindowStart(step=step, state=state.detached(), outer_loss=outer_loss, grads=grads)


def differentiate_window(
    loop: InnerLoop, variables: TensorDict, start: WindowStart, route: GradientRoute = "differentiable"
) -> BackendResult:
    """Returns the derivative of the outer loss through the steps from the window's start to the end, on one graph.

    Cost: as many steps and vjps as the window has; memory of their graphs.
    """
    with torch.enable_grad():
        state = start.state
        outer_loss = torch.zeros((), device=loop.device)
        for step in range(start.step, loop.num_steps):
            state = loop.step(state, variables, step, route)
            if loop.has_step_loss:
                outer_loss = outer_loss + loop.step_loss(state.params, variables, step)
        outer_loss = outer_loss + loop.outer_loss(state.params, variables)
    loop.cost.vjps += loop.num_steps - start.step
    loop.cost.graph_steps = loop.num_steps - start.step
    return BackendResult(
        grads=accumulate(start.grads, vjp([outer_loss], [torch.ones_like(outer_loss)], variables)),
        outer_loss=start.outer_loss + outer_loss.detach(),
        state=state.detached(),
    )
