"""Conjugate gradients: optimal at every iteration, at round-off after as many as there are entries, and ever after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypertorch.linear_solvers import ConjugateGradient
from tests.helpers.problems import normal
from tests.linear_solvers.systems import System, definite, stacked, symmetric

F64 = torch.float64


def after(iterations: int, system: System, **settings: float) -> Tensor:
    return system.solve(ConjugateGradient(max_iterations=iterations, tolerance=0.0, **settings))[0]


def energy(system: System, solution: Tensor) -> float:
    """Returns the error in the norm of `A`."""
    error = solution - system.exact()
    return float((error @ system.matrix @ error).sqrt())


@pytest.mark.parametrize("size", [2, 6, 10])
@pytest.mark.parametrize("iterations", ["n", "n+1", "50"])
def test_the_error_is_at_round_off_from_iteration_n_on(size: int, iterations: str) -> None:
    """A variant that returns the iterate before the last, or an unscaled residual, stalls far above or diverges."""
    system = definite(size, seed=size)
    count = {"n": size, "n+1": size + 1, "50": 50}[iterations]
    exact = system.exact()
    assert float((after(count, system) - exact).norm() / exact.norm()) < 1e-14
    # One iteration less is not enough, so the count is sharp.
    assert float((after(size - 1, system) - exact).norm() / exact.norm()) > 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_iterate_is_the_best_of_its_krylov_space(seed: int) -> None:
    system = definite(7, seed, smallest=0.01)
    krylov = [system.rhs]
    for iterations in range(1, 6):
        basis = torch.linalg.qr(torch.stack(krylov, dim=1)).Q
        best = basis @ torch.linalg.solve(basis.T @ system.matrix @ basis, basis.T @ system.rhs)
        torch.testing.assert_close(after(iterations, system), best, rtol=1e-9, atol=1e-10)
        krylov.append(system.matrix @ krylov[-1])


def test_the_error_in_the_norm_of_the_matrix_falls_at_every_iteration_as_fast_as_the_bound() -> None:
    system = System(symmetric(torch.logspace(-3, 0, 30, dtype=F64), 4), normal(30, seed=5))
    errors = [energy(system, after(iterations, system)) for iterations in range(1, 30)]
    first = energy(system, torch.zeros(30, dtype=F64))
    assert all(later < earlier for earlier, later in zip([first, *errors], errors, strict=False))
    rate = (1000**0.5 - 1) / (1000**0.5 + 1)
    assert all(error <= 2.0 * rate**count * first for count, error in enumerate(errors, start=1))


def test_as_many_iterations_as_different_eigenvalues_are_enough() -> None:
    system = System(symmetric(torch.tensor([0.5] * 4 + [1.0] * 4 + [3.0] * 4, dtype=F64), 6), normal(12, seed=7))
    exact = system.exact()
    assert float((after(3, system) - exact).norm() / exact.norm()) < 1e-13
    assert float((after(2, system) - exact).norm() / exact.norm()) > 1e-2


def test_it_stops_at_the_first_iterate_whose_residual_is_small_enough() -> None:
    system = System(symmetric(torch.logspace(-2, 0, 20, dtype=F64), 8), normal(20, seed=9))
    residuals = [float(system.residual(after(count, system))) for count in range(1, 30)]
    for tolerance in (0.3, 1e-2, 1e-6):
        expected = 1 + next(index for index, residual in enumerate(residuals) if residual <= tolerance)
        system.products = 0
        solution, found = system.solve(ConjugateGradient(max_iterations=100, tolerance=tolerance))
        assert found.iterations == expected
        assert system.products == expected + 1
        assert torch.equal(solution, after(expected, system))


def test_a_residual_as_large_as_the_tolerance_is_small_enough() -> None:
    """By hand: the first iterate of `diag(1, 3) x = (1, 1)` is `(1, 1) / 2`, with the residual `(1, -1) / 2`."""
    system = System(torch.tensor([1.0, 3.0], dtype=F64).diag(), torch.ones(2, dtype=F64))
    solution, found = system.solve(ConjugateGradient(tolerance=0.5))
    assert float(found.residual) == 0.5
    assert found.iterations == 1
    assert torch.equal(solution, torch.full((2,), 0.5, dtype=F64))


def test_a_task_that_is_done_is_frozen_while_others_go_on() -> None:
    quick, slow = definite(8, 1, smallest=1.9), definite(8, 2, smallest=0.001)
    solver = ConjugateGradient(max_iterations=50, tolerance=1e-2)
    alone, own = quick.solve(solver)
    together, found = stacked([quick, slow]).solve(solver)
    assert own.iterations < found.iterations
    torch.testing.assert_close(together[0], alone, rtol=1e-13, atol=0)
    # It would have moved on by far more than that.
    assert float((after(found.iterations, quick) - alone).norm() / alone.norm()) > 1e-4


def test_damping_solves_the_damped_system_and_owns_up_to_it() -> None:
    system = definite(6, 3)
    solution, found = system.solve(ConjugateGradient(damping=0.25, tolerance=1e-15, max_iterations=20))
    torch.testing.assert_close(solution, system.exact(damping=0.25), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.residual, system.residual(solution), rtol=1e-10, atol=0)
    assert float(found.residual) > 0.05


def test_damping_makes_an_indefinite_system_definite() -> None:
    system = System(symmetric(torch.tensor([-0.2, 0.1, 1.0, 2.0], dtype=F64), 4), normal(4, seed=5))
    exact = system.exact(damping=0.5)
    assert float((after(4, system, damping=0.5) - exact).norm() / exact.norm()) < 1e-13


def test_no_number_is_asked_of_the_device_without_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Tensor, "__bool__", lambda self: asked.append(1) or self.item() != 0)
    definite(6, 1).solve(ConjugateGradient(max_iterations=5, tolerance=0.0))
    assert not asked
    _, found = definite(6, 1).solve(ConjugateGradient(max_iterations=3, tolerance=1e-8))
    assert len(asked) == found.iterations == 3


def test_a_direction_that_is_mapped_to_zero_ends_the_task() -> None:
    system = System(torch.zeros(3, 3, dtype=F64), torch.ones(3, dtype=F64))
    solution, found = system.solve(ConjugateGradient())
    assert not solution.any()
    assert float(found.residual) == 1.0
    assert found.iterations == 1
