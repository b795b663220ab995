"""Implicit differentiation against closed forms, with every solver, and over tasks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hypertorch as ht
from hypertorch import linear_solvers
from hypertorch.linear_solvers import ConjugateGradient, Dense, FixedPoint, LinearSolver, Neumann, Nystrom
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge
from tests.hypergradients.implicit.setups import (
    BACKENDS,
    F64,
    GENERAL,
    SGD,
    SYMMETRIC,
    Implicit,
    Proximal,
    allowing,
    assert_close,
    grads,
    scalar,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solved_by", ["400 steps", "formula"])
@pytest.mark.parametrize("lam", [0.3, 1.1])
def test_ridge_equals_the_closed_form_with_every_solver(backend: str, solved_by: str, lam: float) -> None:
    ridge = Ridge()
    problem = ridge.problem(400, SGD(lr=0.2)) if solved_by == "400 steps" else ridge.closed_form_problem()
    result = ht.hypergradient(
        allowing(problem, "eta"), {"lam": scalar(lam), "eta": scalar(0.2)}, backend=BACKENDS[backend]
    )
    torch.testing.assert_close(result.grads["lam"], ridge.exact_hypergradient(scalar(lam)), rtol=1e-10, atol=0)
    assert float(result.figures["linear_residual"]) < 1e-9
    assert ("stationarity" in result.figures) == (solved_by == "400 steps")


def test_every_solver_is_used_here() -> None:
    exported = [getattr(linear_solvers, name) for name in linear_solvers.__all__]
    leaves = {
        item
        for item in exported
        if isinstance(item, type) and issubclass(item, LinearSolver) and not item.__abstractmethods__
    }
    assert leaves == {type(solver) for solver in SYMMETRIC.values()}
    assert {item for item in leaves if not issubclass(item, linear_solvers.SymmetricSolver)} == {
        type(solver) for solver in GENERAL.values()
    }


@pytest.mark.parametrize("backend", [name for name in BACKENDS if "nystrom" not in name])
@pytest.mark.parametrize("penalty", [0.2, 1.0, 3.0])
def test_the_scalar_problem_equals_its_formula(backend: str, penalty: float) -> None:
    """Inner `(x - 1)^2 + l x^2`, outer `(x - 1/2)^2`: the hypergradient is `(l - 1) / (l + 1)^3`."""
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"x": torch.zeros((), dtype=F64)}, lambda p, h, b: (p["x"] - 1) ** 2 + h["l"] * p["x"] ** 2
        ),
        LambdaOuter({"l": scalar(penalty)}, lambda p, h, b: (p["x"] - 0.5) ** 2),
        dynamics=SGD(lr=0.1),
        num_steps=250,
    )
    chosen = BACKENDS[backend]
    if backend in ("gradient, neumann", "gradient, fixed point"):  # the curvature is up to 8
        chosen = replace(chosen, solver=replace(chosen.solver, step_size=0.2))
    found = grads(problem, chosen)["l"]
    torch.testing.assert_close(found, scalar((penalty - 1) / (penalty + 1) ** 3), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("backend", ["gradient, cg", "gradient, neumann", "gradient, dense", "step, fixed point",
                                     "step, dense"])  # fmt: skip
def test_implicit_maml_equals_the_closed_form(backend: str, route: str) -> None:
    """The shared weights are the centre of the proximal term; their part as the initialisation is forgotten."""
    family = Proximal(num_tasks=4)
    result = ht.hypergradient(
        family.problem(), family.hparams, backend=BACKENDS[backend], execution=ht.Execution(tasks=route)
    )
    assert_close(result.grads, family.expected(), 1e-9)
    assert result.figures["linear_residual"].shape == result.figures["stationarity"].shape == (4,)


@pytest.mark.parametrize(
    "solver",
    [
        ConjugateGradient(max_iterations=2, tolerance=0.0),
        ConjugateGradient(max_iterations=9, tolerance=0.02),
        FixedPoint(max_iterations=40, tolerance=0.05, step_size=0.4),
        Neumann(num_terms=3, step_size=0.4),
        Nystrom(rank=2, damping=0.3, seed=2),
        Dense(damping=0.2),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_vectorised_tasks_equal_single_tasks_even_where_the_solver_stops_early(solver: LinearSolver) -> None:
    """Dot products, norms and stopping tests are per task: shared ones would give other iterates."""
    backend = Implicit(solver=solver, residual_tolerance=None, stationarity_tolerance=None)
    family = Proximal(num_tasks=5)
    results = [
        ht.hypergradient(family.problem(num_steps=12), family.hparams, backend=backend, execution=execution)
        for execution in (ht.Execution(tasks="loop"), ht.Execution(tasks="vmap"), ht.Execution(tasks="vmap", chunk=2))
    ]
    for result in results[1:]:
        assert_close(result.grads, results[0].grads, 1e-11)
        for name, figure in results[0].figures.items():
            torch.testing.assert_close(result.figures[name], figure, rtol=1e-9, atol=0)
    assert len(set(results[0].figures["linear_residual"].tolist())) == 5
