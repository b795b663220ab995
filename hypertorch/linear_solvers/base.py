"""The interface of linear solvers, which know the matrix by its products with vectors only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_count
from hypertorch.linear_solvers.settings import COUNT_REASON, TOLERANCE_ADVICE, check_not_negative
from hypertorch.types import TensorDict

Matvec: TypeAlias = Callable[[TensorDict], TensorDict]
"""`v -> A v`, linear, between dictionaries of the same names and shapes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearSolution:
    """What a solver found for `A x = b`.

    Attributes:
        solution: `x`, named and shaped like `b`.
        residual: `|b - A x| / |b|`, computed from `x` itself and from `A` without the solver's damping; 0 where `b` is
            zero. Of shape `()` or `(tasks,)`.
        iterations: iterations, terms or columns that were computed; the most that any task needed.
    """

    solution: TensorDict
    residual: Tensor
    iterations: int


class LinearSolver(ABC):
    """A way to solve `A x = b` from products `A v`; leaves are frozen dataclasses of settings and hold no state.

    With a tasks axis every tensor has one in front and `A` is block-diagonal: it never mixes tasks. Dot products,
    norms, step sizes and stopping tests are then per task, so that a batch of tasks gets the solutions that each task
    would get alone.
    """

    @abstractmethod
    def solve(self, matvec: Matvec, rhs: TensorDict, *, tasks_axis: bool = False) -> LinearSolution:
        """Returns an approximate solution `x` of `A x = b` with its residual; no tensor has a graph.

        Args:
            matvec: `v -> A v`.
            rhs: `b`, with at least one entry.
            tasks_axis: whether every tensor has a leading tasks axis.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class IterativeSolver(LinearSolver):
    """A solver that improves `x` step by step, until the residual of every task is small.

    Args:
        max_iterations: most iterations (at least 1).
        tolerance: `|b - A x| / |b|` at which a task is done; 0 to take all iterations and test nothing.
    """

    max_iterations: int = 100
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        """Checks both; a leaf with settings of its own calls it too."""
        check_fields(self, "tolerance")
        check_count(f"`max_iterations` of `{type(self).__name__}`", self.max_iterations, COUNT_REASON)
        check_not_negative(type(self).__name__, "tolerance", self.tolerance, TOLERANCE_ADVICE)


class SymmetricSolver(LinearSolver):
    """A marker: the solver needs a symmetric `A`. For any other its answer is wrong, without an error."""


def with_damping(matvec: Matvec, damping: float) -> Matvec:
    """Returns `v -> (A + damping I) v`."""
    if not damping:
        return matvec
    # Inside of the product, so that a solver meets the damped matrix wherever it multiplies.
    return lambda vector: tree.add(matvec(vector), vector, alpha=damping)


def relative_size(residual: TensorDict, rhs: TensorDict, *, tasks_axis: bool) -> Tensor:
    """Returns `|residual| / |rhs|`, shape `()` or `(tasks,)`; 0 where `rhs` is zero."""
    # `where` is safe here: nothing is differentiated, so 0 / 0 in the branch not taken does no harm.
    size = tree.norm(rhs, tasks_axis=tasks_axis)
    return torch.where(size == 0, 0.0, tree.norm(residual, tasks_axis=tasks_axis) / size)


def judged(
    matvec: Matvec, rhs: TensorDict, solution: TensorDict, iterations: int, *, tasks_axis: bool
) -> LinearSolution:
    """Returns a solution together with its residual.

    Cost: one product.
    """
    # From the solution itself: the residual of a recurrence drifts away from the true one by rounding.
    residual = tree.add(rhs, matvec(solution), alpha=-1.0)
    return LinearSolution(
        solution=solution, residual=relative_size(residual, rhs, tasks_axis=tasks_axis), iterations=iterations
    )
