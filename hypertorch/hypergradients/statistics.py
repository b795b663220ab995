"""Running statistics that are updated without a derivative and then read: a path that would be missing."""

from __future__ import annotations

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.inner_loop import InnerLoop, InnerState
from hypertorch.types import TensorDict

_MOVE = 0.1  # by which a buffer is moved to see whether it is read, relative to its size and at least this much


def dropped_statistics(loop: InnerLoop, variables: TensorDict) -> frozenset[str]:
    """Returns the names of the buffers that a step changes without a derivative and that a loss reads.

    PyTorch's own norm layers update their running statistics outside the graph. Harmless where nothing reads them, as
    in training mode; where the outer loss is computed in evaluation mode, every derivative misses the path through
    them, in reverse as in forward mode.

    Cost: one inner step, and four evaluations of losses.

    Args:
        loop: an inner loop for this purpose alone.
        variables: hyperparameters and context, as leaves.
    """
    if not loop.has_buffers or loop.num_steps == 0:
        return frozenset()
    with torch.enable_grad():
        before = loop.initial(variables)
        loss = loop.bound_loss(before, 0)
        after = loop.apply(loss, before, variables, 0).detached()
    trained = loop.trained(after.params)
    suspects = [
        name
        for name, value in after.params.items()
        if name not in trained
        and name not in loss.tracked_buffers
        and tree.is_differentiable(value)
        and not torch.equal(value, before.params[name])
    ]
    constants = tree.detach(variables)
    with torch.no_grad():
        values = _losses(loop, after, constants)
        return frozenset(
            name for name in suspects if not torch.equal(values, _losses(loop, _moved(after, name), constants))
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


def _moved(state: InnerState, name: str) -> InnerState:
    value = state.params[name]
    return state._replace(params={**state.params, name: value + _MOVE * (value.abs() + 1.0)})
