"""The inner solution of a problem: the loss whose minimum it is, and the map whose fixed point it is."""

from __future__ import annotations

from hypertorch.autodiff.inner_loss import GradientRoute, InnerLoss
from hypertorch.inner.loop import MAP, InnerLoop, in_order
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


def map_loss(loop: InnerLoop, state: InnerState, route: GradientRoute = "differentiable") -> InnerLoss:
    """Returns the inner loss whose minimum is the inner solution, its data and the state's buffers bound.

    The data is `InnerProblem.full_batch`, or that of the last inner step.

    Args:
        loop: the inner loop.
        state: holds the buffers.
        route: how the gradient of the loss enters a derivative.
    """
    inner = loop.problem.inner
    batch = loop.of_tasks(inner.full_batch()) if inner.has_full_batch else loop.draw(_last_index(loop))
    loss = InnerLoss(loop.functions.inner, loop.buffers(state), batch, route)
    loop.seed(MAP)
    return loss


def map_step(loop: InnerLoop, state: InnerState, variables: TensorDict) -> InnerState:
    """Returns the state after the last step's rule is applied once more, to the loss of the inner solution.

    Args:
        loop: the inner loop.
        state: the state before.
        variables: hyperparameters and context.
    """
    loss, rule = map_loss(loop, state), loop.dynamics
    # The index of the last step, not of one more: a schedule has no entry past the horizon.
    params, dynamics = rule.step(loss, loop.trained(state.params), state.dynamics, variables, _last_index(loop))
    # Counted, but no step of the run: its loss is not among the run's.
    loop.record.add_step(None, tracked_buffers=loss.tracked_buffers)
    params = {**params, **loss.new_buffers}
    return InnerState(in_order(params, state.params, rule), in_order(dynamics, state.dynamics, rule))


def _last_index(loop: InnerLoop) -> int:
    return loop.first_index + max(loop.num_steps - 1, 0)
