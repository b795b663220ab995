"""The inverse of a low-rank approximation of the matrix, made of a few of its columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypertorch.autodiff.noise import random_words
from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_count, check_seed
from hypertorch.linear_solvers.base import LinearSolution, Matvec, SymmetricSolver, judged
from hypertorch.linear_solvers.columns import Layout
from hypertorch.linear_solvers.settings import COUNT_REASON, DAMPING_ADVICE, check_positive
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class Nystrom(SymmetricSolver):
    """The solution for a low-rank approximation of a symmetric `A`, made of `rank` random columns `K`, plus damping.

        A_K = A[:,K] A[K,K]^+ A[K,:],   x = (A_K + damping I)^-1 b

    For matrices with few large eigenvalues, as Hessians of networks have them. With `A_K = U diag(e) U'`, found from a
    QR factorisation of the columns, the inverse is

        x = U ((U'b) / (e + damping)) + (b - U U'b) / damping

    which equals Woodbury's formula, but takes no difference of large numbers. The part of `b` that the columns do not
    span is divided by `damping` alone. With as many columns as entries, `A_K = A`.

    Cost: `rank + 1` products, one after the other but independent, and factorisations of order `n rank^2` for `n`
    entries per task; memory of `rank` vectors.

    Args:
        rank: columns that are computed (at least 1), at most all.
        damping: above 0; the residual that is returned is still that of `A x = b`.
        seed: of the choice of columns, which is the same at every call and for all tasks.

    Raises:
        ValueError: if a number is out of its range.

    References:
        Hataya and Yamada (2023), Nystrom method for accurate and scalable implicit differentiation.
    """

    rank: int = 20
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "damping")
        check_seed(self.seed)
        check_count("`rank` of `Nystrom`", self.rank, COUNT_REASON)
        check_positive("Nystrom", "damping", self.damping, DAMPING_ADVICE)

    @torch.no_grad()
    def solve(self, matvec: Matvec, rhs: TensorDict, *, tasks_axis: bool = False) -> LinearSolution:
        """Returns the solution for the approximation."""
        layout = Layout(example=rhs, tasks_axis=tasks_axis)
        positions = _sample(layout.num_entries, self.rank, self.seed)
        columns = layout.columns(matvec, positions)
        # `A[K,K]` is part of the columns already, so it costs no product.
        block = columns[:, positions]
        # Through QR: `A_K` is factorised in rank x rank, and `columns' columns` would square the condition number.
        orthonormal, triangular = torch.linalg.qr(columns)
        # Symmetrised, because products round; the columns may be dependent, so there may be no inverse.
        pseudo_inverse = torch.linalg.pinv(0.5 * (block + block.mT), hermitian=True)
        core = triangular @ pseudo_inverse @ triangular.mT
        eigenvalues, rotation = torch.linalg.eigh(0.5 * (core + core.mT))
        basis = orthonormal @ rotation

        vectors = layout.vectors(rhs)[..., None]
        coordinates = basis.mT @ vectors
        solution = basis @ (coordinates / (eigenvalues[..., None] + self.damping))
        if len(positions) < layout.num_entries:
            # With all columns nothing is left over but rounding, which the division would blow up.
            solution = solution + (vectors - basis @ coordinates) / self.damping
        return judged(matvec, rhs, layout.values(solution.squeeze(-1)), len(positions), tasks_axis=tasks_axis)


def _sample(num_entries: int, rank: int, seed: int) -> list[int]:
    """Returns `rank` different positions (all, if there are fewer), a function of the seed alone."""
    if rank >= num_entries:
        return list(range(num_entries))
    # Words of the seed alone: a solver must not move torch's generators, and the choice is the same on every platform.
    # A dict, because it keeps the order of the draws.
    chosen: dict[int, None] = {}
    draw = 0
    while len(chosen) < rank:
        chosen.update(dict.fromkeys(int(word) % num_entries for word in random_words(rank - len(chosen), seed, draw)))
        draw += 1
    return list(chosen)
