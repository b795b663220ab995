"""Fixed-point (Richardson) iteration, for systems that a step size makes a contraction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypertorch import tree
from hypertorch.checks.argument_types import check_fields
from hypertorch.linear_solvers.base import IterativeSolver, LinearSolution, Matvec, relative_size
from hypertorch.linear_solvers.settings import STEP_SIZE_ADVICE, check_positive
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class FixedPoint(IterativeSolver):
    """The iteration `x = x + step_size (b - A x)` from `x = 0`, until the residual is small.

    It converges at the rate of the spectral radius of `I - step_size A` if that is below 1, for symmetric and other
    `A`. For `A = I - J` and a step size of 1 it is `x = b + J x`: the reverse pass through an inner run that stays at
    its solution. A task whose residual is small enough is frozen while others go on.

    Cost: `iterations` products. With `tolerance` above 0 every iteration waits for one number from the device.

    `max_iterations` and `tolerance` are those of `IterativeSolver`.

    Args:
        step_size: below 2 over the largest eigenvalue of a symmetric `A`; 1 for `A = I - J` with a contraction `J`.

    Raises:
        ValueError: if a number is out of its range.

    References:
        Grazzi, Franceschi, Pontil and Salzo (2020), On the iteration complexity of hypergradient computation
        (there called the fixed-point method).
    """

    step_size: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "step_size")
        check_positive("FixedPoint", "step_size", self.step_size, STEP_SIZE_ADVICE)

    @torch.no_grad()
    def solve(self, matvec: Matvec, rhs: TensorDict, *, tasks_axis: bool = False) -> LinearSolution:
        """Returns the iterate at which every task is done, or the last one."""
        solution, residual = tree.zeros_like(rhs), rhs
        left = tree.norm(residual, tasks_axis=tasks_axis)
        enough = self.tolerance * left
        # Negated, so that NaN is not taken for a solution.
        is_active = ~(left <= enough)
        iterations = 0
        while iterations < self.max_iterations and (not self.tolerance or bool(is_active.any())):
            solution = tree.add(solution, residual, alpha=self.step_size * is_active.to(left.dtype))
            # Computed anew, for the same one product that an update of it would cost: no rounding builds up.
            residual = tree.add(rhs, matvec(solution), alpha=-1.0)
            left = tree.norm(residual, tasks_axis=tasks_axis)
            is_active = is_active & ~(left <= enough)
            iterations += 1
        return LinearSolution(
            # Not `judged`: this residual is that of the last iterate already, which saves a product.
            solution=solution,
            residual=relative_size(residual, rhs, tasks_axis=tasks_axis),
            iterations=iterations,
        )
