"""Running statistics that are updated without a derivative and then read: a path that would be missing."""

from __future__ import annotations

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.inner_loop import InnerLoop
from hypertorch.inner_state import InnerState
from hypertorch.types import TensorDict

_MOVE = 0.1  # by which tensors are moved to see what depends on them, relative to their size and at least this much


def dropped_statistics(loop: InnerLoop, variables: TensorDict) -> frozenset[str]:
    """Returns the names of the buffers that depend on what is learnt, without a derivative, and that a loss reads.

    PyTorch's own norm layers update their running statistics outside the graph. Harmless where nothing reads them, as
    in training mode; where the outer loss is computed in evaluation mode, every derivative misses the path through
    them, in reverse as in forward mode. Dependence is seen by moving things and looking for a change.

    Cost: two inner gradients, and four evaluations of losses for every buffer in doubt.

    Args:
        loop: an inner loop for this purpose alone.
        variables: hyperparameters and context, as leaves.
    """
    if not loop.has_buffers or loop.num_steps == 0:
        return frozenset()
    with torch.enable_grad():
        before = loop.initial(variables)
        loss = loop.bound_loss(before, 0)
        loss.gradient(loop.trained(before.params), variables)
    untracked = {
        name: value.detach()
        for name, value in loss.new_buffers.items()
        if name not in loss.tracked_buffers and tree.is_differentiable(value)
    }
    if not untracked:
        return frozenset()
    constants, state = tree.detach(variables), before.detached()
    with torch.no_grad():
        again = loop.bound_loss(state, 0)
        again.gradient(_moved(loop.trained(state.params)), _moved(constants))
        after = state._replace(params={**state.params, **tree.detach(loss.new_buffers)})
        values = _losses(loop, after, constants)
        return frozenset(
            name
            for name, value in untracked.items()
            if not torch.equal(value, again.new_buffers[name])
            and not torch.equal(values, _losses(loop, _with_moved(after, name), constants))
        )


def refuse_dropped_statistics(dropped: frozenset[str]) -> None:
    """Raises if there are statistics whose path would be missing.

    Raises:
        IncompatibleBackendError: naming one of them.
    """
    if dropped:
        raise IncompatibleBackendError(
            f"the buffer `{min(dropped)}` is updated by the inner loss without a derivative (as PyTorch's norm layers "
            "do with running statistics) and read by a loss: the hypergradient through it would silently be missing. "
            "Use a norm whose statistics keep their derivative, such as `hypertorch.fewshot.BatchNorm(features, "
            "statistics='running')`; or judge by the statistics of each batch (`track_running_stats=False`, or the "
            "module in training mode)."
        )


def _losses(loop: InnerLoop, state: InnerState, variables: TensorDict) -> Tensor:
    """Returns the outer loss, and the inner loss of a next step."""
    next_step = min(1, loop.num_steps - 1)
    inner = loop.bound_loss(state, next_step)(loop.trained(state.params), variables)
    return torch.stack([loop.outer_loss(state.params, variables), inner.mean()])


def _moved(values: TensorDict) -> TensorDict:
    return {
        name: value + _MOVE * (value.abs() + 1.0) if tree.is_differentiable(value) else value
        for name, value in values.items()
    }


def _with_moved(state: InnerState, name: str) -> InnerState:
    return state._replace(params={**state.params, **_moved({name: state.params[name]})})
