"""Solvers that write out columns of the matrix: all of them, or a few for a low-rank approximation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypertorch.linear_solvers import Dense, Nystrom
from hypertorch.linear_solvers.nystrom import _sample
from tests.helpers.problems import normal
from tests.linear_solvers.systems import System, definite, skewed, stacked, symmetric

F64 = torch.float64


def woodbury(system: System, solver: Nystrom) -> Tensor:
    """The paper's formula, with its inverses written out."""
    rho, chosen = solver.damping, _sample(len(system.rhs), solver.rank, solver.seed)
    columns, block = system.matrix[:, chosen], system.matrix[chosen][:, chosen]
    small = torch.linalg.inv(block + columns.T @ columns / rho)
    return system.rhs / rho - columns @ (small @ (columns.T @ system.rhs)) / rho**2


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("damping", [1.0, 0.05])
@pytest.mark.parametrize("seed", [0, 1])
def test_nystrom_is_the_formula_of_the_paper(rank: int, damping: float, seed: int) -> None:
    system = definite(8, 3)
    solver = Nystrom(rank=rank, damping=damping, seed=seed)
    solution, found = system.solve(solver)
    torch.testing.assert_close(solution, woodbury(system, solver), rtol=1e-9, atol=1e-10)
    assert found.iterations == rank
    assert system.products == rank + 1


@pytest.mark.parametrize("rank", [8, 9, 100])
@pytest.mark.parametrize("damping", [0.1, 1e-9])
def test_at_full_rank_only_the_damping_is_left(rank: int, damping: float) -> None:
    system = definite(8, 4)
    solution, found = system.solve(Nystrom(rank=rank, damping=damping))
    torch.testing.assert_close(solution, system.exact(damping=damping), rtol=1e-12, atol=1e-13)
    assert found.iterations == 8
    # (A + damping) x = b leaves damping x over.
    torch.testing.assert_close(found.residual, damping * solution.norm() / system.rhs.norm(), rtol=1e-4, atol=1e-14)


def test_a_matrix_of_low_rank_needs_no_more_columns_than_that() -> None:
    factor = normal(30, 4, seed=5)
    system = System(factor @ factor.T, normal(30, seed=6))
    for rank in (4, 6):
        solution, _ = system.solve(Nystrom(rank=rank, damping=0.1))
        torch.testing.assert_close(solution, system.exact(damping=0.1), rtol=1e-9, atol=1e-9)
    poor, _ = system.solve(Nystrom(rank=3, damping=0.1))
    assert float((poor - system.exact(damping=0.1)).norm() / poor.norm()) > 1e-3


def test_eigenvalues_of_either_sign_are_kept() -> None:
    system = System(symmetric(torch.tensor([-1.0, -0.5, 0.7, 2.0], dtype=F64), 7), normal(4, seed=8))
    solution, _ = system.solve(Nystrom(rank=4, damping=0.1))
    torch.testing.assert_close(solution, system.exact(damping=0.1), rtol=1e-12, atol=1e-13)


def test_the_seed_chooses_different_columns() -> None:
    choices = {tuple(_sample(100, 5, seed)) for seed in range(20)}
    assert len(choices) == 20
    for choice in choices:
        assert len(set(choice)) == 5
        assert all(0 <= position < 100 for position in choice)
    # Every column is chosen about as often as any other: 40 times, standard deviation 6.
    counts = torch.bincount(torch.tensor([item for seed in range(800) for item in _sample(100, 5, seed)]))
    assert int(counts.min()) > 40 - 30
    assert int(counts.max()) < 40 + 30
    assert sorted(_sample(100, 99, 0)) == sorted(set(_sample(100, 99, 0)))
    system = definite(8, 3)
    first, second = (system.solve(Nystrom(rank=3, damping=0.1, seed=seed))[0] for seed in (0, 1))
    assert not torch.allclose(first, second)


def test_dense_solves_any_system_and_its_damped_form() -> None:
    for system in (skewed(7, 1), System(normal(7, 7, seed=2), normal(7, seed=3))):
        solution, found = system.solve(Dense())
        torch.testing.assert_close(solution, system.exact(), rtol=1e-11, atol=1e-12)
        assert (found.iterations, system.products) == (7, 8)
        damped, again = system.solve(Dense(damping=0.2))
        torch.testing.assert_close(damped, system.exact(damping=0.2), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(again.residual, system.residual(damped), rtol=1e-10, atol=0)


def test_dense_refuses_what_is_too_large_before_any_product() -> None:
    system = stacked([definite(6, 1), definite(6, 2)])
    with pytest.raises(ValueError, match=r"`rhs` has 6 entries per task, more than `max_entries` = 5 .*`FixedPoint`"):
        system.solve(Dense(max_entries=5))
    assert system.products == 0
    system.solve(Dense(max_entries=6))


def test_dense_names_a_singular_map() -> None:
    good, singular = definite(3, 1), System(torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=F64)), normal(3, seed=1))
    for system in (singular, stacked([good, singular])):
        with pytest.raises(ValueError, match=r"`matvec` is a singular map of 3 entries: .*no solution, or many"):
            system.solve(Dense())
    solution, _ = singular.solve(Dense(damping=0.5))
    torch.testing.assert_close(solution, singular.exact(damping=0.5), rtol=1e-13, atol=0)
