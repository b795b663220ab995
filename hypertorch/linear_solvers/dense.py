"""The solution by the whole matrix and its factorisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_count
from hypertorch.linear_solvers.base import LinearSolution, LinearSolver, Matvec, judged
from hypertorch.linear_solvers.columns import Layout
from hypertorch.linear_solvers.settings import COUNT_REASON, DAMPING_ADVICE, check_not_negative
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """The exact solution for any invertible `A`: its matrix is computed from unit vectors and factorised (LU).

    It serves small systems, and as the reference for other solvers.

    Cost: with `n` entries per task, `n + 1` products and a factorisation of order `n^3`; memory of `n^2` numbers for
    each task. The factorisation waits for the device.

    Args:
        damping: solve `(A + damping I) x = b` instead; the residual that is returned is still that of `A x = b`.
        max_entries: most entries per task that are accepted (at least 1).

    Raises:
        ValueError: if a number is out of its range; (from `solve`) if there are more entries, or the matrix is
            singular.
    """

    damping: float = 0.0
    max_entries: int = 4096

    def __post_init__(self) -> None:
        check_fields(self, "damping")
        check_not_negative("Dense", "damping", self.damping, DAMPING_ADVICE)
        check_count("`max_entries` of `Dense`", self.max_entries, COUNT_REASON)

    @torch.no_grad()
    def solve(self, matvec: Matvec, rhs: TensorDict, *, tasks_axis: bool = False) -> LinearSolution:
        """Returns the solution up to rounding."""
        layout = Layout(example=rhs, tasks_axis=tasks_axis)
        if layout.num_entries > self.max_entries:
            raise ValueError(
                f"`rhs` has {layout.num_entries} entries per task, more than `max_entries` = {self.max_entries} of "
                "`Dense`: their matrix takes the square of that in memory, and the cube in time. Use a solver that "
                "needs no matrix, such as `FixedPoint` (`ConjugateGradient` if it is symmetric), or raise the limit."
            )
        matrix = layout.columns(matvec, range(layout.num_entries))
        # Here and not in the products: the residual is judged without damping, so `matvec` stays as it is.
        matrix.diagonal(dim1=1, dim2=2).add_(self.damping)
        # `solve_ex` reports singular matrices in `info`, so that the message can name the argument.
        solution, info = torch.linalg.solve_ex(matrix, layout.vectors(rhs))
        if bool(info.any()):
            raise ValueError(
                f"`matvec` is a singular map of {layout.num_entries} entries: the system has no solution, or many. "
                f"Pass `damping` above {self.damping} to `Dense`; or, if it is symmetric, use `ConjugateGradient`, "
                "which takes the shortest of many."
            )
        return judged(matvec, rhs, layout.values(solution), layout.num_entries, tasks_axis=tasks_axis)
