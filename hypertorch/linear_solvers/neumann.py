"""The truncated Neumann series of the inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypertorch import tree
from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_count
from hypertorch.linear_solvers.base import LinearSolution, LinearSolver, Matvec, judged
from hypertorch.linear_solvers.settings import COUNT_REASON, STEP_SIZE_ADVICE, check_positive
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    """A fixed number of terms of the Neumann series, for any `A` that the step size makes a contraction.

        x = step_size * sum_{k=0}^{num_terms-1} (I - step_size A)^k b

    The residual `b - A x = (I - step_size A)^num_terms b` falls geometrically if the spectral radius of
    `I - step_size A` is below 1, and grows without bound if it is above. One term is `step_size * b`, the identity in
    place of the inverse. The result equals that of `FixedPoint` with as many iterations, without its test.

    Cost: `num_terms` products; no wait for the device.

    Args:
        num_terms: terms of the series (at least 1).
        step_size: below 2 over the largest eigenvalue of a symmetric `A`; 1 for `A = I - J` with a contraction `J`.

    Raises:
        ValueError: if a number is out of its range.

    References:
        Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by implicit differentiation,
        algorithm 3.
    """

    num_terms: int = 20
    step_size: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "step_size")
        check_count("`num_terms` of `Neumann`", self.num_terms, COUNT_REASON)
        check_positive("Neumann", "step_size", self.step_size, STEP_SIZE_ADVICE)

    @torch.no_grad()
    def solve(self, matvec: Matvec, rhs: TensorDict, *, tasks_axis: bool = False) -> LinearSolution:
        """Returns the sum of the first `num_terms` terms."""
        term = {name: self.step_size * value for name, value in rhs.items()}
        solution = term
        # No test of convergence, which would wait for the device at every term.
        for _ in range(self.num_terms - 1):
            term = tree.add(term, matvec(term), alpha=-self.step_size)
            solution = tree.add(solution, term)
        return judged(matvec, rhs, solution, self.num_terms, tasks_axis=tasks_axis)
