"""The Neumann series and the fixed-point iteration: their terms by hand, and that they are one iteration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypertorch.linear_solvers import FixedPoint, Neumann
from tests.linear_solvers.systems import System, definite, skewed, stacked

F64 = torch.float64


def series(system: System, num_terms: int, step_size: float) -> Tensor:
    iteration = torch.eye(len(system.rhs), dtype=F64) - step_size * system.matrix
    powers = [torch.linalg.matrix_power(iteration, power) for power in range(num_terms)]
    return step_size * torch.stack(powers).sum(0) @ system.rhs


@pytest.mark.parametrize("num_terms", [1, 2, 7])
@pytest.mark.parametrize("step_size", [1.0, 0.4])
@pytest.mark.parametrize("make", [definite, skewed])
def test_both_are_the_sum_of_the_series(num_terms: int, step_size: float, make: type) -> None:
    """At a step size other than 1 as well, where peers' variants lose a factor."""
    system = make(6, 1)
    expected = series(system, num_terms, step_size)
    neumann, found = system.solve(Neumann(num_terms=num_terms, step_size=step_size))
    fixed_point, again = system.solve(FixedPoint(max_iterations=num_terms, tolerance=0.0, step_size=step_size))
    torch.testing.assert_close(neumann, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fixed_point, expected, rtol=1e-12, atol=1e-14)
    iteration = torch.eye(6, dtype=F64) - step_size * system.matrix
    left = torch.linalg.matrix_power(iteration, num_terms) @ system.rhs
    for residual in (found.residual, again.residual):
        torch.testing.assert_close(residual, left.norm() / system.rhs.norm(), rtol=1e-10, atol=0)


def test_the_error_falls_at_the_rate_of_the_contraction() -> None:
    system = skewed(6, 2)  # every eigenvalue of J has the modulus 0.7, and J'J = 0.49 I
    residuals = [float(system.solve(Neumann(num_terms=terms))[1].residual) for terms in range(1, 30)]
    for terms, residual in enumerate(residuals, start=1):
        assert residual == pytest.approx(0.7**terms, rel=1e-9)


def test_a_step_size_beyond_the_curvature_diverges_and_says_so() -> None:
    system = definite(5, 1)  # largest eigenvalue 2
    for solver in (Neumann(num_terms=40, step_size=1.2), FixedPoint(max_iterations=40, step_size=1.2)):
        assert float(system.solve(solver)[1].residual) > 10.0


def test_the_fixed_point_stops_at_the_first_iterate_that_is_good_enough() -> None:
    system = definite(6, 3)
    for tolerance in (0.5, 1e-3, 1e-9):
        residuals = [
            float(system.solve(FixedPoint(max_iterations=count, tolerance=0.0, step_size=0.8))[1].residual)
            for count in range(1, 120)
        ]
        expected = 1 + next(index for index, residual in enumerate(residuals) if residual <= tolerance)
        system.products = 0
        _, found = system.solve(FixedPoint(max_iterations=500, tolerance=tolerance, step_size=0.8))
        assert found.iterations == system.products == expected
        assert float(found.residual) <= tolerance


def test_a_task_that_is_done_is_frozen_while_others_go_on() -> None:
    quick, slow = definite(6, 1, smallest=1.0, largest=1.2), definite(6, 2, smallest=0.05)
    solver = FixedPoint(max_iterations=300, tolerance=1e-2, step_size=0.8)
    alone, own = quick.solve(solver)
    together, found = stacked([quick, slow]).solve(solver)
    assert own.iterations < 10 < found.iterations
    torch.testing.assert_close(together[0], alone, rtol=1e-13, atol=0)
    assert 1e-4 < float((together[0] - quick.exact()).norm() / alone.norm()) < 1e-2


def test_no_number_is_asked_of_the_device_without_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Tensor, "__bool__", lambda self: asked.append(1) or self.item() != 0)
    definite(6, 1).solve(Neumann(num_terms=5))
    definite(6, 1).solve(FixedPoint(max_iterations=5, tolerance=0.0))
    assert not asked
    definite(6, 1).solve(FixedPoint(max_iterations=3, tolerance=1e-9))
    assert len(asked) == 3
