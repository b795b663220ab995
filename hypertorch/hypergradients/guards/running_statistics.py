"""Buffers that a forward pass moves and a loss reads: a path that the hypergradient would miss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hypertorch import tree
from hypertorch.autodiff.parameter_slots import Moved, Watch, moved_away, watching
from hypertorch.errors import IncompatibleBackendError
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict

_REMEDIES = (
    "Call `.eval()` on the {layer}, which then keeps its buffers: they are constants, and the hypergradient is exact. "
    "Or use what keeps its derivative: `hypertorch.fewshot.BatchNorm(features, statistics='running')`, the statistics "
    "of each batch alone (`track_running_stats=False`, or every loss in training mode), and in place of "
    "`spectral_norm` a parametrisation of your own that divides by `torch.linalg.matrix_norm(weight, ord=2)`."
)


def refuse_dropped_buffers(loop: InnerLoop, variables: TensorDict) -> None:
    """Raises if a forward pass moves buffers in a way that the hypergradient would miss.

    Cost: two inner gradients and four evaluations of losses; and a few more for every buffer in doubt.

    Args:
        loop: an inner loop for this purpose alone, without a tasks axis.
        variables: hyperparameters and context, as leaves.

    Raises:
        IncompatibleBackendError: naming a buffer.
    """
    dropped = _updated_without_derivative(loop, variables)
    if dropped:
        raise IncompatibleBackendError(
            f"the buffer `{min(dropped)}` is updated by the inner loss without a derivative (as PyTorch's norm layers "
            "do with running statistics) and read by a loss: the hypergradient through it would silently be missing. "
            + _REMEDIES.format(layer="layer")
        )
    _refuse_undeclared(loop, variables)


def _updated_without_derivative(loop: InnerLoop, variables: TensorDict) -> frozenset[str]:
    """Returns the names of the buffers that depend on what is learnt, without a derivative, and that a loss reads.

    PyTorch's own norm layers update their running statistics outside the graph. Harmless where nothing reads them, as
    in training mode; where the outer loss is computed in evaluation mode, every derivative misses the path through
    them, in reverse as in forward mode. Dependence is seen by moving things and looking for a change.

    Cost: two inner gradients, and four evaluations of losses for every buffer in doubt.
    """
    if not loop.has_buffers or loop.num_steps == 0:
        return frozenset()
    with torch.enable_grad():
        before = loop.initial(variables)
        loss = loop.loss_at(before, 0)
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
        # With params and variables moved: what changes depends on them, whether a derivative says so or not.
        again = loop.loss_at(state, 0)
        again.gradient(_moved(loop.trained(state.params)), _moved(constants))
        after = state._replace(params={**state.params, **tree.detach(loss.new_buffers)})
        # And with the buffer moved, which shows whether a loss reads it.
        values = _losses(loop, after, constants)
        return frozenset(
            name
            for name, value in untracked.items()
            if not torch.equal(value, again.new_buffers[name])
            and not torch.equal(values, _losses(loop, _with_moved(after, name), constants))
        )


def _refuse_undeclared(loop: InnerLoop, variables: TensorDict) -> None:
    """Raises for a buffer that a loss moves for itself, and that nobody carries along.

    Moved for nothing is no harm, as in batch norm in training mode, where no loss reads the running statistics.
    """
    constants = tree.detach(variables)
    with torch.no_grad():
        state = loop.initial(constants).detached()

    def inner(params: TensorDict) -> Tensor:
        return loop.loss_at(state._replace(params=params), 0)(loop.trained(params), constants)

    def outer(params: TensorDict) -> Tensor:
        return loop.outer(params, constants)

    leaves = {**state.params, **tree.leaves_requiring_grad(loop.trained(state.params))}
    elsewhere = {**state.params, **_moved(loop.trained(state.params))}
    declared = loop.problem.inner.buffers
    # Nothing carries a buffer on from the outer loss: what it moves
    # without a derivative and reads is lost to every backend.
    in_outer = {
        name: found
        for name, found in _watched(outer, leaves).moved.items()
        if _lacks_derivative(name, found, outer, elsewhere) and _is_read(name, [outer], state.params)
    }
    if in_outer:
        name, found = min(in_outer.items())
        raise IncompatibleBackendError(
            f"the outer loss moves the buffer `{name}` without a derivative, and reads it: the hypergradient would "
            f"silently miss that path. {_REMEDIES.format(layer=_describe(found.layer))}"
        )
    if not loop.num_steps:
        return
    watch = _watched(inner, leaves)
    for slots, names in watch.calls:
        trained = slots.buffer_names & set(names) & loop.trained(state.params).keys()
        if trained:
            name = min(trained)
            raise IncompatibleBackendError(
                f"the buffer `{name}` of a {type(slots.module).__name__} is among the params, so the inner loop would "
                "train it: a buffer is no parameter. Set `buffers = net.buffers` in the inner problem, which carries "
                "buffers along as they are; to train it, make it an `nn.Parameter` of the module."
            )
    for name, found in sorted(watch.moved.items()):
        # Who asked for the new values, and declares buffers, may carry them along under other names.
        if name in declared or (found.is_returned and declared) or not _is_read(name, [inner, outer], state.params):
            continue
        if _lacks_derivative(name, found, inner, elsewhere):
            raise IncompatibleBackendError(
                f"the inner loss moves the buffer `{name}` without a derivative, and a loss reads it: the "
                f"hypergradient would silently miss that path. {_REMEDIES.format(layer=_describe(found.layer))}"
            )
        raise IncompatibleBackendError(
            f"the inner loss moves the buffer `{name}` of a {type(found.layer).__name__} and a loss reads it, but it "
            "is not carried along: every step would start from its first value. Set `buffers = net.buffers` in the "
            "inner problem, take the loss from `outputs, new_buffers = net.with_buffers(params, inputs)`, and return "
            "`loss, new_buffers`."
        )


def _watched(loss: Callable[[TensorDict], Tensor], params: TensorDict) -> Watch:
    """Returns what a loss makes of modules: their calls, and the buffers that it moves, with their graph."""
    with torch.enable_grad(), watching() as watch:
        loss(params)
    return watch


def _lacks_derivative(name: str, found: Moved, loss: Callable[[TensorDict], Tensor], elsewhere: TensorDict) -> bool:
    """Returns whether the new value of a buffer depends on the params by no derivative.

    Args:
        name: of the buffer.
        found: what the loss made of it.
        loss: the loss.
        elsewhere: other params, with the same buffers.
    """
    # An integer, such as a count of batches, moves and has no derivative to miss.
    if found.value.requires_grad or not tree.is_differentiable(found.value):
        return False
    with torch.no_grad(), watching() as watch:
        loss(elsewhere)
    return name not in watch.moved or not torch.equal(watch.moved[name].value, found.value)


def _is_read(name: str, losses: list[Callable[[TensorDict], Tensor]], params: TensorDict) -> bool:
    """Returns whether a loss depends on what a buffer is when a module is called."""
    with torch.no_grad():
        for loss in losses:
            plain = loss(params)
            # Shifted where a call begins: a loss may hand the buffer over, or leave the module its own.
            with watching(shifted=name):
                if not torch.equal(plain, loss(params)):
                    return True
    return False


def _describe(layer: nn.Module) -> str:
    return f"`{type(layer).__name__}`"


def _losses(loop: InnerLoop, state: InnerState, variables: TensorDict) -> Tensor:
    """Returns the outer loss, and the inner loss of a next step."""
    # The next step is the first that reads what a step has left.
    next_step = min(1, loop.num_steps - 1)
    inner = loop.loss_at(state, next_step)(loop.trained(state.params), variables)
    return torch.stack([loop.outer(state.params, variables), inner.mean()])


def _moved(values: TensorDict) -> TensorDict:
    return {name: moved_away(value) if tree.is_differentiable(value) else value for name, value in values.items()}


def _with_moved(state: InnerState, name: str) -> InnerState:
    return state._replace(params={**state.params, **_moved({name: state.params[name]})})
