"""Antithetic pairs of inner runs that go on from outer step to outer step, each with what perturbed it so far."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict

# Hyperparameters are shared by all tasks, and so are their perturbations: `shared.` says that there is no tasks axis.
_STATES, _SUMS = "particles", "shared.perturbations"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """Two inner runs that were perturbed in opposite directions.

    Attributes:
        states: their inner states, of the run along the perturbations first.
        perturbations: the sum of the perturbations of the hyperparameters so far, in units of their size.
    """

    states: tuple[InnerState, InnerState]
    perturbations: TensorDict


def read_pairs(loop: InnerLoop, num_pairs: int) -> list[Pair]:
    """Returns the pairs that the last outer step left; none if it left none.

    Raises:
        IncompatibleBackendError: if it left another number of them.
    """
    states, sums = loop.carried(_STATES), loop.carried(_SUMS)
    found = len({name.split(".")[0] for name in states})
    # None in a run's first outer step, or where it starts afresh.
    if found not in (0, num_pairs):
        raise IncompatibleBackendError(
            f"`carry` holds {found} pairs of particles, but `num_pairs` is {num_pairs}: particles cannot be added to a "
            "run, or taken away. Go on with the same number, or start afresh with an empty carry."
        )
    return [_read_pair(str(pair), states, sums) for pair in range(found)]


def pairs_to_carry(pairs: list[Pair]) -> TensorDict:
    """Returns the pairs as entries of a carry."""
    carry: TensorDict = {}
    for position, pair in enumerate(pairs):
        for side, state in zip(("ahead", "behind"), pair.states, strict=True):
            start = f"{_STATES}.{position}.{side}"
            carry.update(tree.with_prefix(f"{start}.params", state.params))
            carry.update(tree.with_prefix(f"{start}.dynamics", state.dynamics))
        carry.update(tree.with_prefix(f"{_SUMS}.{position}", pair.perturbations))
    return carry


def _read_pair(pair: str, states: TensorDict, sums: TensorDict) -> Pair:
    def state(side: str) -> InnerState:
        own: dict[str, Tensor] = tree.without_prefix(f"{pair}.{side}", states)
        return InnerState(tree.without_prefix("params", own), tree.without_prefix("dynamics", own))

    return Pair(states=(state("ahead"), state("behind")), perturbations=tree.without_prefix(pair, sums))
