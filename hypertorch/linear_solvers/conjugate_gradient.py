"""Conjugate gradients, for symmetric positive definite systems."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypertorch import tree
from hypertorch.checks.argument_types import check_fields
from hypertorch.linear_solvers.base import (
    IterativeSolver,
    LinearSolution,
    Matvec,
    SymmetricSolver,
    judged,
    with_damping,
)
from hypertorch.linear_solvers.settings import DAMPING_ADVICE, check_not_negative
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(IterativeSolver, SymmetricSolver):
    """Conjugate gradients for a symmetric positive definite `A`, from `x = 0`.

    With `r = p = b` at first, each iteration minimises the error in the norm of `A` over one dimension more:

        a = r'r / p'Ap,   x = x + a p,   r_next = r - a Ap,   p = r_next + (r_next'r_next / r'r) p

    In exact arithmetic it ends after as many iterations as `A` has different eigenvalues; before, the error in the
    norm of `A` falls by `(sqrt(c) - 1) / (sqrt(c) + 1)` or better per iteration, `c` the condition number. A task
    whose residual is small enough, or whose direction `A` maps to zero, is frozen while others go on. With negative
    eigenvalues it may diverge: a `damping` above the size of the most negative one makes the system definite, and the
    damped system is solved.

    Cost: `iterations + 1` products. With `tolerance` above 0 every iteration waits for one number from the device.

    `max_iterations` and `tolerance` are those of `IterativeSolver`, with `|r|` for `|b - A x|`.

    Args:
        damping: solve `(A + damping I) x = b` instead; the residual that is returned is still that of `A x = b`.

    Raises:
        ValueError: if a number is out of its range.

    References:
        Hestenes and Stiefel (1952), Methods of conjugate gradients for solving linear systems.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "damping")
        check_not_negative("ConjugateGradient", "damping", self.damping, DAMPING_ADVICE)

    @torch.no_grad()
    def solve(self, matvec: Matvec, rhs: TensorDict, *, tasks_axis: bool = False) -> LinearSolution:
        """Returns the iterate at which every task is done, or the last one."""
        product = with_damping(matvec, self.damping)
        solution, residual, direction = tree.zeros_like(rhs), rhs, rhs
        squared = tree.dot(rhs, rhs, tasks_axis=tasks_axis)
        enough = self.tolerance**2 * squared  # squares compared: no root per iteration
        # Negated, so that NaN is not taken for a solution.
        is_active = ~(squared <= enough)
        iterations = 0
        while iterations < self.max_iterations and (not self.tolerance or bool(is_active.any())):
            image = product(direction)
            curvature = tree.dot(direction, image, tasks_axis=tasks_axis)
            # `A` is singular or indefinite, and along this direction no step is the best one.
            is_active = is_active & (curvature != 0)
            # A frozen task takes steps of length 0: a mask costs no wait for the device, an index would.
            length = torch.where(is_active, squared / curvature, 0.0)
            solution = tree.add(solution, direction, alpha=length)
            residual = tree.add(residual, image, alpha=-length)
            before, squared = squared, tree.dot(residual, residual, tasks_axis=tasks_axis)
            direction = tree.add(residual, direction, alpha=torch.where(is_active, squared / before, 0.0))
            is_active = is_active & ~(squared <= enough)
            iterations += 1
        return judged(matvec, rhs, solution, iterations, tasks_axis=tasks_axis)
