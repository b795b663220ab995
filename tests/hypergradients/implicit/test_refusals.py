"""What implicit differentiation refuses, and no steps at all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import hypertorch as ht
from hypertorch.errors import (
    IncompatibleBackendError,
    NonFiniteError,
)
from hypertorch.linear_solvers import ConjugateGradient, FixedPoint, LinearSolver, Nystrom
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge, net_problem
from tests.hypergradients.implicit.setups import (
    EXACT,
    F64,
    SGD,
    Implicit,
    allowing,
    grads,
    maps,
    scalar,
    softmax,
)


def test_without_a_step_a_rule_with_buffers_starts_them() -> None:
    ridge = Ridge()
    closed = ridge.closed_form_problem()
    for dynamics in (SGD(lr=0.2, momentum=0.5), ht.dynamics.Adam(lr=0.2, eps=0.5)):
        found = grads(replace(closed, dynamics=dynamics), EXACT["step"])["lam"]
        torch.testing.assert_close(found, ridge.exact_hypergradient(scalar(0.3)), rtol=1e-10, atol=0)


def test_terms_at_inner_steps_are_refused() -> None:
    problem = net_problem(SGD(lr=0.3), {}, step_terms=True)
    with pytest.raises(IncompatibleBackendError, match=r"`Implicit` got an outer problem with `step_loss`.*`Reverse"):
        grads(problem, Implicit())


@pytest.mark.parametrize("solver", [ConjugateGradient(), Nystrom()])
def test_symmetric_solvers_are_refused_for_steps(solver: LinearSolver) -> None:
    with pytest.raises(IncompatibleBackendError, match=(
        rf"`solver` is {type(solver).__name__}\(.* with `map='step'`: .*not symmetric.* Use `FixedPoint\(\)`"
    )):  # fmt: skip
        Implicit(solver=solver, map="step")


def test_conjugate_gradients_would_have_been_wrong_there() -> None:
    """The refusal is for a reason: the same system, by a solver that does not know of its asymmetry."""
    problem = softmax(SGD(lr=0.4, momentum=0.5), 120)

    class Disguised(LinearSolver):
        def solve(self, matvec, rhs, *, tasks_axis=False):
            return ConjugateGradient(max_iterations=60, tolerance=1e-13).solve(matvec, rhs, tasks_axis=tasks_axis)

    right = grads(problem, EXACT["step"])["log_l2"]
    wrong = grads(problem, Implicit(solver=Disguised(), map="step", residual_tolerance=None))["log_l2"]
    assert float((wrong - right).abs() / right.abs()) > 1e-2


def test_an_inner_loss_that_is_linear_has_no_solution() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.zeros(2, dtype=F64)}, lambda p, h, b: p["w"].sum() * 2.0 + h["c"]),
        LambdaOuter({"c": scalar(0.4)}, lambda p, h, b: p["w"].sum() * h["c"]),
        dynamics=SGD(lr=0.3),
        num_steps=2,
    )
    with pytest.raises(IncompatibleBackendError, match=r"`InnerProblem.loss` is linear in its params.*no minimum"):
        grads(problem, Implicit())


def test_nor_has_one_that_is_linear_in_every_param_of_which_the_outer_loss_reads_some() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.zeros(2, dtype=F64), "bias": torch.zeros(2, dtype=F64)},
            lambda p, h, b: (p["w"] + 2.0 * p["bias"]).sum() + h["c"],
        ),
        LambdaOuter({"c": scalar(0.4)}, lambda p, h, b: p["w"].sum() * h["c"]),
        dynamics=SGD(lr=0.3),
        num_steps=2,
    )
    with pytest.raises(IncompatibleBackendError, match=r"`InnerProblem.loss` is linear in its params.*no minimum"):
        grads(problem, Implicit())


@maps
def test_a_run_that_diverges_is_named_and_not_warned_of(kind: str) -> None:
    problem = allowing(Ridge().problem(400, SGD(lr=1e3)), "eta")
    with pytest.raises(NonFiniteError, match="inner step"):
        grads(problem, EXACT[kind])


def test_an_infinite_slope_of_the_outer_loss_is_no_zero() -> None:
    """The root has no derivative at the solution `w = 0`: NaN must not become a finite hypergradient."""
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.zeros(3, dtype=F64)},
                    lambda p, h, b: (p["w"] * h["c"]).square().sum()),
        LambdaOuter({"c": torch.ones(3, dtype=F64)}, lambda p, h, b: p["w"].square().sum().sqrt()),
        dynamics=SGD(lr=0.1),
        num_steps=2,
    )  # fmt: skip
    for backend in (Implicit(), Implicit(solver=FixedPoint(), map="step"), *EXACT.values()):
        with pytest.raises(NonFiniteError):
            grads(problem, backend)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"map": "hessian"}, ValueError, r"`map` is 'hessian', which names no equation .* Use 'gradient' or 'step'"),
        ({"solver": "cg"}, TypeError, r"`solver` is 'cg', not a `LinearSolver`: .* Pass an instance"),
        ({"residual_tolerance": -1.0}, ValueError, r"`residual_tolerance` is -1.0: .*never below 0. Pass"),
        ({"stationarity_tolerance": math.nan}, ValueError, r"`stationarity_tolerance` is nan: .*or None for no"),
    ],
)
def test_settings_are_validated(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Implicit(**settings)
