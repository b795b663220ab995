"""Where NaN or infinity first appeared: a failing run is run again to say so, and a healthy one pays nothing."""

from __future__ import annotations

from hypertorch import tree
from hypertorch.errors import NonFiniteError
from hypertorch.inner_loop import InnerLoop
from hypertorch.types import TensorDict


def first_non_finite(loop: InnerLoop, variables: TensorDict) -> NonFiniteError | None:
    """Runs forward and returns the error for the first entry that is not finite; None if all are.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, without a graph.
    """
    for name, value in variables.items():
        if not tree.all_finite([value]):
            return _non_finite(f"`{name}`", "before the first inner step", "The last outer step, or the data,")
    state = loop.initial(variables)
    for name, value in zip(state.names(), state.tensors(), strict=True):
        if not tree.all_finite([value]):
            return _non_finite(f"`{name}`", "in the initial inner state", "`init_params`")
    for step in range(loop.num_steps):
        state, loss = loop.step_and_loss(state, variables, step)
        if loss is not None and not tree.all_finite([loss]):
            return _non_finite("the inner loss", f"at inner step {step}", "The inner step size, or the loss itself,")
        for name, value in zip(state.names(), state.tensors(), strict=True):
            if not tree.all_finite([value]):
                return _non_finite(f"`{name}`", f"after inner step {step}", "The inner step size")
    if not tree.all_finite([loop.outer_loss(state.params, variables)]):
        return _non_finite(
            "the outer loss",
            f"after {loop.num_steps} inner steps",
            "An overflowing inner step, or the outer loss,",
        )
    return None


def _non_finite(entry: str, where: str, suspect: str) -> NonFiniteError:
    return NonFiniteError(
        f"{entry} holds NaN or infinity {where}: no hypergradient exists there. {suspect} is the first thing to look "
        "at; a smaller inner step size keeps the inner run stable."
    )


def non_finite_hypergradient(grads: TensorDict) -> NonFiniteError:
    """Returns the error for a hypergradient that is not finite although the forward run is."""
    culprit = next(name for name, value in grads.items() if not tree.all_finite([value]))
    return NonFiniteError(
        f"the hypergradient of `{culprit}` is not finite, although every inner state and the outer loss are: the "
        "reverse pass overflowed, or met an infinite derivative (such as of a square root at 0). Shorten the horizon, "
        "lower the inner step size, or keep the losses away from the singular point."
    )
