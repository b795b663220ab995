"""Implicit differentiation against unrolling in the limit, with its rate, and against the formula at any point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.linear_solvers import ConjugateGradient, FixedPoint, Neumann
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaOuter, Ridge, net_problem
from tests.hypergradients.implicit.setups import (
    EXACT,
    F64,
    LONG,
    SGD,
    SILENT,
    Implicit,
    Reverse,
    SoftmaxInner,
    SoftmaxOuter,
    allowing,
    assert_close,
    grads,
    maps,
    scalar,
    softmax,
)


@pytest.mark.parametrize("rule", LONG)
def test_a_step_and_the_gradient_agree_with_unrolling_at_the_solution(rule: str) -> None:
    dynamics, num_steps = LONG[rule]
    problem = softmax(dynamics, num_steps)
    unrolled = grads(problem, Reverse())
    assert_close(grads(problem, Implicit(solver=ConjugateGradient(tolerance=1e-13))), unrolled, 1e-8)
    assert_close(grads(problem, Implicit(solver=FixedPoint(max_iterations=2000, tolerance=1e-12), map="step")),
                 unrolled, 1e-8)  # fmt: skip
    assert_close(grads(problem, EXACT["step"]), unrolled, 1e-8)


@maps
def test_equals_central_differences(kind: str) -> None:
    problem = softmax(*LONG["momentum"])
    check = ht.check_hypergradient(problem, problem.init_hparams(), EXACT[kind])
    assert check.passed, str(check)


def test_the_error_falls_at_the_rate_of_the_contraction() -> None:
    """`w_T` approaches the solution as `rate^T`, and so does the implicit hypergradient; unrolling as `T rate^T`."""
    ridge, eta = Ridge(), 0.2
    rate = float((1 - eta * (ridge.eigenvalues + 0.3)).abs().max())
    exact = ridge.exact_hypergradient(scalar(0.3))
    horizons = (100, 120, 140)
    for backend in SILENT.values():
        errors = [
            float((grads(allowing(ridge.problem(steps, SGD(lr=eta)), "eta"), backend)["lam"] - exact).abs())
            for steps in horizons
        ]
        assert errors[1] / errors[0] == pytest.approx(rate**20, rel=0.02)
        assert errors[2] / errors[1] == pytest.approx(rate**20, rel=0.01)
    gaps = [
        float((grads(ridge.problem(steps), Reverse())["lam"] - exact).abs()) / (steps * rate**steps)
        for steps in horizons
    ]
    assert gaps[2] == pytest.approx(gaps[1], rel=0.1) and gaps[1] == pytest.approx(gaps[0], rel=0.1)


def test_with_momentum_the_rate_is_that_of_params_and_buffers_together() -> None:
    ridge, lr, momentum = Ridge(), 0.2, 0.2
    steps = [
        torch.tensor([[1 - lr * float(c), -lr * momentum], [float(c), momentum]], dtype=F64)
        for c in ridge.eigenvalues + 0.3
    ]
    rate = max(float(torch.linalg.eigvals(step).abs().max()) for step in steps)
    assert rate < float((1 - lr * (ridge.eigenvalues + 0.3)).max()) - 0.01
    exact = ridge.exact_hypergradient(scalar(0.3))
    for backend in SILENT.values():
        first, second = (
            allowing(ridge.problem(num_steps, SGD(lr=lr, momentum=momentum)), "eta") for num_steps in (80, 100)
        )
        errors = [float((grads(problem, backend)["lam"] - exact).abs()) for problem in (first, second)]
        assert errors[1] / errors[0] == pytest.approx(rate**20, rel=0.02)


@pytest.mark.parametrize("terms", [1, 2, 5, 20])
def test_terms_of_the_series_are_steps_of_truncated_reverse_mode_at_the_solution(terms: int) -> None:
    """At a point that stands still, the reverse pass through K steps is the sum of K terms of the series."""
    problem = softmax(*LONG["momentum"])
    truncated = grads(problem, ht.hypergradients.Truncated(window=terms))
    backend = Implicit(solver=Neumann(num_terms=terms), map="step", residual_tolerance=None)
    assert_close(grads(problem, backend), truncated, 1e-9)


def by_hand(problem: ht.BilevelProblem, params: TensorDict, batch: Batch) -> TensorDict:
    """The formula with the Hessian written out, at given params and data."""
    hparams = {name: value.clone().requires_grad_() for name, value in problem.init_hparams().items()}
    sizes, shapes = [value.numel() for value in params.values()], [value.shape for value in params.values()]
    point = torch.cat([value.flatten() for value in params.values()]).requires_grad_()

    def at(vector: Tensor) -> TensorDict:
        parts = [part.reshape(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        return dict(zip(params, parts, strict=True))

    [gradient] = torch.autograd.grad(problem.inner.loss(at(point), hparams, batch), point, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(entry, point, retain_graph=True)[0] for entry in gradient])
    outer_loss = problem.outer.loss(at(point), hparams, None)
    outward, *direct = torch.autograd.grad(outer_loss, [point, *hparams.values()], allow_unused=True)
    q = torch.linalg.solve(hessian, outward)
    through = torch.autograd.grad(gradient, list(hparams.values()), grad_outputs=-q, allow_unused=True)
    return {
        name: sum((part for part in (own, other) if part is not None), torch.zeros_like(value))
        for (name, value), own, other in zip(hparams.items(), direct, through, strict=True)
    }


@pytest.mark.parametrize("num_steps", [3, 4])
@pytest.mark.parametrize("has_full_batch", [False, True])
def test_equals_the_formula_on_the_data_of_the_solution(num_steps: int, has_full_batch: bool) -> None:
    """On a net with minibatches, anywhere: the Hessian need not be definite, nor the point stationary."""
    problem = net_problem(SGD(lr=0.3), {}, num_steps=num_steps)
    last_batch = problem.inner.batch(num_steps - 1)
    everything = torch.arange(12)
    if has_full_batch:

        class Inner(type(problem.inner)):  # type: ignore[misc]
            def full_batch(self) -> Tensor:
                return everything

        problem = ht.BilevelProblem(Inner(), problem.outer, dynamics=problem.dynamics, num_steps=num_steps)
    problem = allowing(problem, "init.first", "init.second")
    result = ht.hypergradient(problem, problem.init_hparams(), backend=SILENT["gradient"])
    expected = by_hand(problem, result.params, everything if has_full_batch else last_batch)
    assert_close(result.grads, expected, 1e-7)
    other = by_hand(problem, result.params, last_batch if has_full_batch else everything)
    assert float((other["weights"] - expected["weights"]).norm()) > 1e-3


@maps
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_noise_in_the_map_is_the_same_for_every_product(kind: str, dropout: float) -> None:
    """The step of plain descent has the gradient's noise, so both maps say the same, anywhere and under dropout."""
    problem = allowing(net_problem(SGD(lr=0.3), {}, dropout=dropout), "init.first", "init.second")
    first, again = (grads(problem, SILENT[kind]) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert_close(first, grads(problem, SILENT["gradient"]), 1e-7)


@maps
def test_the_direct_term_is_included(kind: str) -> None:
    def without_direct_term() -> ht.BilevelProblem:
        class Outer(SoftmaxOuter):
            def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
                return super().loss(params, {"log_l2": torch.zeros(())}, batch)

        return ht.BilevelProblem(SoftmaxInner(), Outer(), dynamics=SGD(lr=0.8), num_steps=100)

    whole, part = grads(softmax(SGD(lr=0.8), 100), EXACT[kind]), grads(without_direct_term(), EXACT[kind])
    torch.testing.assert_close(whole["log_l2"] - part["log_l2"], scalar(-0.2), rtol=1e-9, atol=0)
    torch.testing.assert_close(whole["weights"], part["weights"], rtol=1e-12, atol=0)


@maps
def test_a_hyperparameter_with_a_direct_term_alone_has_that(kind: str) -> None:
    ridge = Ridge()
    inner = ridge.problem(300, SGD(lr=0.2)).inner
    outer = LambdaOuter(
        {"lam": scalar(0.3), "offset": scalar(0.5)}, lambda p, h, b: ridge.outer_loss(p["w"]) + h["offset"] ** 2
    )
    found = grads(ht.BilevelProblem(inner, outer, dynamics=SGD(lr=0.2), num_steps=300), EXACT[kind])
    torch.testing.assert_close(found["offset"], scalar(1.0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found["lam"], ridge.exact_hypergradient(scalar(0.3)), rtol=1e-9, atol=0)
