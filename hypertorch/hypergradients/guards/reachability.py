"""Which hyperparameters reach the outer loss: asked of the problem itself, whatever the backend can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hypertorch import tree
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError
from hypertorch.hypergradients.base import BlackBox, Hypergradient, PathBlind, RandomDirections
from hypertorch.inner import memo
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.inner.tasks import TaskSlice
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict

Probe = Callable[[], frozenset[str]]
"""Returns the names of the hyperparameters that reach the outer loss."""

# By which the black-box probe moves a hyperparameter, relative to its size and at least this much, until something
# changes: values that are constant in pieces, such as an accuracy, change with large moves only.
_MOVES = (1e-3, -1e-3, 0.1, -0.1, 1.0, -1.0)
REACHED = "hyperparameters that reach the outer loss"


def check_reachability(
    backend: Hypergradient, grads: dict[str, torch.Tensor | None], allowed: Iterable[str], probe: Probe
) -> None:
    """Raises if the hypergradient of a hyperparameter would be a silent zero, or noise around one.

    Where the backend followed a path nothing is asked, so that most runs pay nothing.

    Args:
        backend: what computed the grads.
        grads: what it returned; None where it followed no path.
        allowed: names that may have none.
        probe: asks the problem itself; called only in doubt.

    Raises:
        DetachedHyperparameterError: if one does not reach the outer loss at all.
        IncompatibleBackendError: if one does, but the backend drops every path from it.
    """
    # A name that may have no path is not asked about, and costs nothing.
    judged = {name: value for name, value in grads.items() if name not in set(allowed)}
    # Those whose value shows that there is a path.
    followed = _followed(backend, {name: value for name, value in judged.items() if value is not None})
    suspects = [name for name in judged if name not in followed]
    if not suspects:
        return
    # Only now, in doubt: it costs a run.
    reached = probe()
    detached = [name for name in suspects if name not in reached]
    if detached:
        raise DetachedHyperparameterError(
            f"`hparams[{detached[0]!r}]` does not reach the outer loss"
            + (f" (nor do {detached[1:]})" if detached[1:] else "")
            + ": its hypergradient would be a silent zero. Use it in `init_params`, in a loss or in the dynamics, "
            "without `.detach()`, `.item()`, `torch.no_grad()` or a comparison (values alone are enough for "
            "`EvolutionStrategies`); or list it in `allow_unused`."
        )
    dropped = [name for name in suspects if judged[name] is None]
    if dropped:
        raise IncompatibleBackendError(
            f"`hparams[{dropped[0]!r}]` reaches the outer loss"
            + (f" (so do {dropped[1:]})" if dropped[1:] else "")
            + f", but by no path that `{backend!r}` follows: its hypergradient would be a silent zero. Use an exact "
            "backend such as `Reverse()`, take the entry out of the outer variables, or list it in `allow_unused` to "
            "accept zeros."
        )


def _followed(backend: Hypergradient, values: TensorDict) -> set[str]:
    """Returns the names of the values that show that there is a path."""
    if isinstance(backend, (RandomDirections, BlackBox)):
        return set()
    return tree.not_zero(values) if isinstance(backend, PathBlind) else set(values)


def known_reach(problem: BilevelProblem, kind: str, hparams: TensorDict, probe: Probe) -> frozenset[str]:
    """Returns what a probe finds, which is run once for each problem, kind of probe and set of names."""
    # What is reached may depend on values, a weight of zero say: another problem of the kind is asked for itself.
    parts = (problem.inner, problem.outer, problem.context, problem.dynamics)
    key = (kind, memo.Same(*(part for part in parts if part is not None)), problem.num_steps, *hparams)
    return memo.recall(REACHED, key, probe)


def moved_by_values(bound: BoundProblem, hparams: TensorDict, slices: list[TaskSlice | None]) -> frozenset[str]:
    """Returns the names of the hyperparameters that change the outer loss or the last inner state when moved.

    Cost: one forward run, and one for every hyperparameter (more where a small move changes nothing); no derivative is
    taken, so losses may have none.
    """
    with bound.running(), torch.no_grad():
        constants = tree.detach(hparams)

        def end(values: TensorDict) -> list[torch.Tensor]:
            tensors: list[torch.Tensor] = []
            for item in slices:
                # Computed anew for each move: the path may go through it.
                context = bound.context(values, item)
                loop = bound.loop(item, context)
                tensors += _end_of(loop, {**values, **context})
            return tensors

        first = end(constants)
        reached: set[str] = set()
        for name, value in constants.items():
            for move in _MOVES:
                # By value, without a tolerance: noise and data are the same,
                # so any change comes from this hyperparameter.
                again = end({**constants, name: value + move * (value.abs() + 1.0)})
                if not all(torch.equal(left, right) for left, right in zip(first, again, strict=True)):
                    reached.add(name)
                    break
        return frozenset(reached)


def _end_of(loop: InnerLoop, variables: TensorDict) -> list[torch.Tensor]:
    terms: list[torch.Tensor] = []

    def advance(state: InnerState, step: int) -> InnerState:
        done = loop.step(state, variables, step)
        terms.extend([] if done.term is None else [done.term])
        return done.state

    state = scan(advance, loop.initial(variables), range(loop.num_steps))
    return [loop.outer(state.params, variables), *terms, *state.tensors()]
