"""Linear systems whose solution is known, as the solvers see them: products between dictionaries."""

from __future__ import annotations

import torch
from torch import Tensor

from hypertorch.linear_solvers import LinearSolution, LinearSolver
from hypertorch.types import TensorDict
from tests.helpers.problems import normal


class System:
    """`A x = b` with the vector split over several tensors; counts the products that are asked for.

    Args:
        matrix: shape `(n, n)` or `(tasks, n, n)`, n at least 1.
        rhs: shape `(n,)` or `(tasks, n)`.
    """

    def __init__(self, matrix: Tensor, rhs: Tensor) -> None:
        self.matrix, self.rhs = matrix, rhs
        self.products = 0

    @property
    def has_tasks(self) -> bool:
        return self.rhs.dim() == 2

    def split(self, vector: Tensor) -> TensorDict:
        """Returns the first number (a scalar), and the rest as a column if it is even, else as a row."""
        first, rest = vector[..., 0], vector[..., 1:]
        return {"first": first, "rest": rest[..., None, :] if rest.shape[-1] % 2 else rest[..., :, None]}

    def join(self, values: TensorDict) -> Tensor:
        shape = self.rhs.shape[:-1]
        return torch.cat([values["first"][..., None], values["rest"].reshape(*shape, -1)], dim=-1)

    def matvec(self, vector: TensorDict) -> TensorDict:
        self.products += 1
        assert {name: value.shape for name, value in vector.items()} == {
            name: value.shape for name, value in self.split(self.rhs).items()
        }
        return self.split((self.matrix @ self.join(vector)[..., None]).squeeze(-1))

    def solve(self, solver: LinearSolver) -> tuple[Tensor, LinearSolution]:
        """Returns the solution as a vector, and all that was returned."""
        found = solver.solve(self.matvec, self.split(self.rhs), tasks_axis=self.has_tasks)
        return self.join(found.solution), found

    def exact(self, damping: float = 0.0) -> Tensor:
        eye = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype)
        return torch.linalg.solve(self.matrix + damping * eye, self.rhs[..., None]).squeeze(-1)

    def residual(self, solution: Tensor) -> Tensor:
        """Returns `|b - A x| / |b|`."""
        left = self.rhs - (self.matrix @ solution[..., None]).squeeze(-1)
        return left.norm(dim=-1) / self.rhs.norm(dim=-1)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def symmetric(eigenvalues: Tensor, seed: int) -> Tensor:
    """Returns a symmetric matrix with these eigenvalues in a random basis."""
    basis = rotation(len(eigenvalues), seed)
    return basis @ torch.diag(eigenvalues) @ basis.T


def definite(size: int, seed: int, smallest: float = 0.3, largest: float = 2.0) -> System:
    """Returns a random symmetric positive definite system."""
    eigenvalues = torch.linspace(smallest, largest, size, dtype=torch.float64)
    return System(symmetric(eigenvalues, seed), normal(size, seed=seed + 1))


def skewed(size: int, seed: int) -> System:
    """Returns a system with `A = I - J`, J a contraction that is not symmetric and has complex eigenvalues."""
    matrix = torch.eye(size, dtype=torch.float64) - 0.7 * rotation(size, seed)
    assert float((matrix - matrix.T).norm()) > 0.5
    return System(matrix, normal(size, seed=seed + 1))


def stacked(systems: list[System]) -> System:
    """Returns the systems as tasks of one batch."""
    return System(torch.stack([system.matrix for system in systems]), torch.stack([system.rhs for system in systems]))
