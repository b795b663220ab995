"""Where NaN or infinity first appeared: a failing run is run again to say so, and a healthy one pays nothing."""

from __future__ import annotations

from hypertorch import tree
from hypertorch.errors import NonFiniteError
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.types import Batch, TensorDict

_SMALLER_STEPS = "A smaller inner step size keeps the inner run stable; if that is not it, look at the loss itself."
_BAD_DATA = "So does its data, which is the first thing to look at: see what `{method}` returns."


def first_non_finite(loop: InnerLoop, variables: TensorDict) -> NonFiniteError | None:
    """Runs forward and returns the error for the first entry that is not finite; None if all are.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, without a graph.
    """
    for name, value in variables.items():
        if not tree.all_finite([value]):
            return _non_finite(f"`{name}`", "before the first inner step", "Look at the last outer step or the data.")
    state = loop.initial(variables)
    for name, value in zip(state.names(), state.tensors(), strict=True):
        if not tree.all_finite([value]):
            return _non_finite(f"`{name}`", "in the initial inner state", "Look at `init_params`.")
    found: list[NonFiniteError] = []

    def advance(state: InnerState, step: int) -> InnerState:
        # The scan goes on to the end, but nothing is computed after the first find.
        if found:
            return state
        state, loss, _ = loop.step(state, variables, step)
        # The loss first: it is computed before the state that it is stepped to.
        if loss is not None and not tree.all_finite([loss]):
            advice = _SMALLER_STEPS if step > 0 else "Nothing was stepped yet: look at the loss and the initial params."
            if not _is_finite(loop.draw(loop.first_index + step)):
                advice = _BAD_DATA.format(method="InnerProblem.batch")
            found.append(_non_finite("the inner loss", f"at inner step {step}", advice, inner_step=step))
        for name, value in zip(state.names(), state.tensors(), strict=True):
            if not tree.all_finite([value]):
                found.append(_non_finite(f"`{name}`", f"after inner step {step}", _SMALLER_STEPS, inner_step=step))
        return state

    state = scan(advance, state, range(loop.num_steps))
    if found:
        return found[0]
    if not tree.all_finite([loop.outer(state.params, variables)]):
        advice = _SMALLER_STEPS if _is_finite(loop.outer_batch) else _BAD_DATA.format(method="OuterProblem.batch")
        return _non_finite("the outer loss", f"after {loop.num_steps} inner steps", advice)
    return None


def _is_finite(batch: Batch) -> bool:
    return tree.all_finite(tree.batch_tensors(batch))


def _non_finite(entry: str, where: str, advice: str, *, inner_step: int | None = None) -> NonFiniteError:
    message = f"{entry} holds NaN or infinity {where}: no hypergradient exists there. {advice}"
    return NonFiniteError(message, inner_step=inner_step)


def non_finite_hypergradient(grads: TensorDict, figures: TensorDict) -> NonFiniteError:
    """Returns the error for a hypergradient that is not finite although the forward run is.

    Args:
        grads: the hypergradient.
        figures: what the backend says of its own accuracy.
    """
    culprit = next(name for name, value in grads.items() if not tree.all_finite([value]))
    own = ", ".join(f"`{name}` = {float(value.max()):.0e}" for name, value in figures.items())
    return NonFiniteError(
        f"the hypergradient of `{culprit}` is not finite, although every inner state and the outer loss are: the "
        "reverse pass overflowed, or met an infinite derivative (such as of a square root at 0)."
        + (f" Of its own accuracy the backend reports {own}." if own else "")
        + " Shorten the horizon, lower the inner step size, or keep the losses away from the singular point."
    )
