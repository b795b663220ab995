"""A linear solver of one's own: minimal residual steps, for matrices whose symmetric part is positive definite."""

from dataclasses import dataclass

import torch

from hypertorch import tree
from hypertorch.linear_solvers import LinearSolution, LinearSolver


@dataclass(frozen=True, kw_only=True)
class MinimalResidual(LinearSolver):
    """Steps along the residual, each as long as makes the next residual smallest: `alpha = <r, A r> / <A r, A r>`."""

    num_iterations: int = 200

    @torch.no_grad()
    def solve(self, matvec, rhs, *, tasks_axis=False):
        solution, residual = tree.zeros_like(rhs), rhs
        for _ in range(self.num_iterations):
            product = matvec(residual)
            # With a tasks axis these are one number for each task, so that tasks do not mix.
            top = tree.dot(residual, product, tasks_axis=tasks_axis)
            bottom = tree.dot(product, product, tasks_axis=tasks_axis)
            length = torch.where(bottom > 0, top / bottom, 0.0)  # 0 / 0 at the solution
            solution = tree.add(solution, residual, alpha=length)
            residual = tree.add(residual, product, alpha=-length)
        # What is reported is the residual of the solution itself, not the one that was updated along the way.
        left = tree.norm(tree.add(rhs, matvec(solution), alpha=-1.0), tasks_axis=tasks_axis)
        size = tree.norm(rhs, tasks_axis=tasks_axis)
        return LinearSolution(
            solution=solution, residual=torch.where(size > 0, left / size, 0.0), iterations=self.num_iterations
        )
