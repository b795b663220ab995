"""Ways to solve a linear system that is known by its products with vectors: one file per algorithm."""

from hypertorch.linear_solvers.base import LinearSolution, LinearSolver, Matvec, SymmetricSolver
from hypertorch.linear_solvers.conjugate_gradient import ConjugateGradient
from hypertorch.linear_solvers.dense import Dense
from hypertorch.linear_solvers.fixed_point import FixedPoint
from hypertorch.linear_solvers.neumann import Neumann
from hypertorch.linear_solvers.nystrom import Nystrom

__all__ = [
    "ConjugateGradient",
    "Dense",
    "FixedPoint",
    "LinearSolution",
    "LinearSolver",
    "Matvec",
    "Neumann",
    "Nystrom",
    "SymmetricSolver",
]
