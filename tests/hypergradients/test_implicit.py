"""Implicit differentiation: closed forms, agreement with unrolling and its rate, what has no path, and warnings."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from hypertorch import linear_solvers
from hypertorch.errors import (
    DetachedHyperparameterError,
    IncompatibleBackendError,
    LinearSolveWarning,
    NonFiniteError,
)
from hypertorch.linear_solvers import ConjugateGradient, Dense, FixedPoint, LinearSolver, Neumann, Nystrom
from hypertorch.live_memory import PeakMemory
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge, net_problem, normal

Implicit, Reverse = ht.hypergradients.Implicit, ht.hypergradients.Reverse
SGD, Hyper = ht.dynamics.SGD, ht.Hyper
F64 = torch.float64

# For eigenvalues of the Hessian in (0.1, 3); of `I - J` too, for the step sizes below.
SYMMETRIC: dict[str, LinearSolver] = {
    "cg": ConjugateGradient(tolerance=1e-14),
    "neumann": Neumann(num_terms=300, step_size=0.4),
    "fixed point": FixedPoint(max_iterations=500, tolerance=1e-14, step_size=0.4),
    "nystrom": Nystrom(rank=5, damping=1e-13),
    "dense": Dense(),
}
GENERAL: dict[str, LinearSolver] = {
    "neumann": Neumann(num_terms=600),
    "fixed point": FixedPoint(max_iterations=1000, tolerance=1e-14),
    "dense": Dense(),
}
BACKENDS = {
    **{f"gradient, {name}": Implicit(solver=solver) for name, solver in SYMMETRIC.items()},
    **{f"step, {name}": Implicit(solver=solver, map="step") for name, solver in GENERAL.items()},
}
EXACT = {"gradient": Implicit(solver=Dense()), "step": Implicit(solver=Dense(), map="step")}
SILENT = {name: replace(backend, residual_tolerance=None, stationarity_tolerance=None)
          for name, backend in EXACT.items()}  # fmt: skip
maps = pytest.mark.parametrize("kind", EXACT)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def allowing(problem: ht.BilevelProblem, *names: str) -> ht.BilevelProblem:
    return replace(problem, allow_unused=names)


def grads(problem: ht.BilevelProblem, backend: ht.Hypergradient, **hparams: Tensor) -> TensorDict:
    return ht.hypergradient(problem, {**problem.init_hparams(), **hparams}, backend=backend).grads


def assert_close(actual: TensorDict, expected: TensorDict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = float((actual[name] - value).norm() / value.norm().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: relative error {error:.2g}"


class SoftmaxInner(ht.InnerProblem):
    """Softmax regression with example weights and an L2 penalty: convex, and nowhere quadratic."""

    def __init__(self) -> None:
        self.inputs, self.labels = normal(12, 4, seed=10), torch.arange(12) % 3

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"matrix": torch.zeros(4, 3, dtype=F64), "bias": torch.zeros(3, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.inputs @ params["matrix"] + params["bias"], self.labels, reduction="none")
        penalty = sum(value.square().sum() for value in params.values())
        return (hparams["weights"].sigmoid() * losses).mean() + hparams["log_l2"].exp() * penalty


class SoftmaxOuter(ht.OuterProblem):
    """Cross-entropy on other data, with a direct term in `log_l2`."""

    def __init__(self, extra: TensorDict | None = None) -> None:
        self.inputs, self.labels = normal(9, 4, seed=20), torch.arange(9) % 3
        self.extra = extra or {}

    def init_hparams(self) -> TensorDict:
        return {"weights": 0.5 * normal(12, seed=32), "log_l2": scalar(-1.0), **self.extra}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        logits = self.inputs @ params["matrix"] + params["bias"]
        return F.cross_entropy(logits, self.labels) + 0.1 * hparams["log_l2"] ** 2


def softmax(dynamics: ht.Dynamics, num_steps: int, **options: object) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        SoftmaxInner(), SoftmaxOuter(), dynamics=dynamics, num_steps=num_steps, **options  # type: ignore[arg-type]
    )  # fmt: skip


# --- closed forms ---------------------------------------------------------------------------------------------------


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


class Proximal:
    """Tasks `|A w - y|^2 / 2n + strength / 2 |w - theta|^2` of different conditioning, judged by `|B w - z|^2 / 2`.

    With `H = A'A/n`: `w = (H + strength)^-1 (A'y/n + strength theta)`, so `df/dtheta = strength (H + strength)^-1
    dE/dw` and `df/dstrength = dE/dw' (H + strength)^-1 (theta - w)`.
    """

    def __init__(self, num_tasks: int) -> None:
        scales = (
            torch.logspace(0, 0.8, 5, dtype=F64)[None, None]
            ** torch.linspace(0, 1, num_tasks, dtype=F64)[:, None, None]
        )
        self.a, self.y = normal(num_tasks, 7, 5, seed=1) / scales, normal(num_tasks, 7, seed=2)
        self.b, self.z = normal(num_tasks, 4, 5, seed=3), normal(num_tasks, 4, seed=4)
        self.hparams = {"theta.w": normal(3, seed=5), "theta.v": normal(2, 1, seed=6), "strength": scalar(0.7)}

    def expected(self) -> TensorDict:
        theta, strength = torch.cat([self.hparams["theta.w"], self.hparams["theta.v"][:, 0]]), self.hparams["strength"]
        in_theta, in_strength = torch.zeros(5, dtype=F64), scalar(0.0)
        for a, y, b, z in zip(self.a, self.y, self.b, self.z, strict=True):
            inverse = torch.linalg.inv(a.T @ a / len(a) + strength * torch.eye(5, dtype=F64))
            w = inverse @ (a.T @ y / len(a) + strength * theta)
            outward = inverse @ b.T @ (b @ w - z) / len(self.a)
            in_theta, in_strength = in_theta + strength * outward, in_strength + outward @ (theta - w)
        return {"theta.w": in_theta[:3], "theta.v": in_theta[3:, None], "strength": in_strength}

    def problem(self, **options: object) -> ht.BilevelProblem:
        family = self

        class Inner(ht.InnerProblem):
            def init_params(self, hparams: TensorDict) -> TensorDict:
                return {"w": hparams["theta.w"], "v": hparams["theta.v"]}

            def batch(self, step: int) -> Batch:
                return family.a, family.y

            def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
                a, y = batch
                distance = sum((value - hparams[f"theta.{name}"]).square().sum() for name, value in params.items())
                return (a @ flat(params) - y).square().sum() / (2 * len(a)) + hparams["strength"] * distance / 2

        class Outer(ht.OuterProblem):
            def init_hparams(self) -> TensorDict:
                return family.hparams

            def batch(self, outer_step: int) -> Batch:
                return family.b, family.z

            def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
                b, z = batch
                return (b @ flat(params) - z).square().sum() / 2

        settings = {"dynamics": SGD(lr=0.3), "num_steps": 200, "num_tasks": len(self.a), **options}
        return ht.BilevelProblem(Inner(), Outer(), **settings)  # type: ignore[arg-type]


def flat(params: TensorDict) -> Tensor:
    return torch.cat([params["w"], params["v"][:, 0]])


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("backend", ["gradient, cg", "gradient, neumann", "gradient, dense", "step, fixed point",
                                     "step, dense"])  # fmt: skip
def test_implicit_maml_equals_the_closed_form(backend: str, route: str) -> None:
    """The shared weights are the centre of the proximal term; their part as the initialisation is forgotten."""
    family = Proximal(num_tasks=4)
    result = ht.hypergradient(family.problem(task_route=route), family.hparams, backend=BACKENDS[backend])
    assert_close(result.grads, family.expected(), 1e-9)
    assert result.figures["linear_residual"].shape == result.figures["stationarity"].shape == (4,)


# --- tasks ----------------------------------------------------------------------------------------------------------


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
        ht.hypergradient(family.problem(num_steps=12, **options), family.hparams, backend=backend)
        for options in ({"task_route": "loop"}, {"task_route": "vmap"}, {"task_route": "vmap", "task_chunk": 2})
    ]
    for result in results[1:]:
        assert_close(result.grads, results[0].grads, 1e-11)
        for name, figure in results[0].figures.items():
            torch.testing.assert_close(result.figures[name], figure, rtol=1e-9, atol=0)
    assert len(set(results[0].figures["linear_residual"].tolist())) == 5


# --- unrolling in the limit -----------------------------------------------------------------------------------------

LONG: dict[str, tuple[ht.Dynamics, int]] = {
    "SGD": (SGD(lr=0.8), 100),
    "momentum": (SGD(lr=0.4, momentum=0.5), 100),
    "Nesterov": (SGD(lr=0.4, momentum=0.5, nesterov=True), 100),
    "dampened": (SGD(lr=0.8, momentum=0.5, dampening=0.3), 120),
    "Adam": (ht.dynamics.Adam(lr=0.1, beta1=0.5, beta2=0.8, eps=0.2), 160),
    "RMSprop": (ht.dynamics.RMSprop(lr=0.1, alpha=0.8, eps=0.2), 160),
    "Groups": (ht.dynamics.Groups({"bias": SGD(lr=0.5), "*": SGD(lr=0.4, momentum=0.5)}), 120),
}


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


# --- the formula itself, at any point -------------------------------------------------------------------------------


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


# --- the rule of the dynamics ---------------------------------------------------------------------------------------


class PlainLeastSquares(ht.InnerProblem):
    """The ridge problem without its penalty."""

    def __init__(self, ridge: Ridge) -> None:
        self.ridge = ridge

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.zeros_like(self.ridge.target)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self.ridge.inner_loss(params["w"], torch.zeros((), dtype=F64))


def decayed(ridge: Ridge, **settings: object) -> ht.BilevelProblem:
    """Ridge regression whose penalty is the weight decay of the dynamics."""
    return ht.BilevelProblem(
        PlainLeastSquares(ridge),
        LambdaOuter({"lam": scalar(0.3)}, lambda p, h, b: ridge.outer_loss(p["w"])),
        dynamics=SGD(lr=0.2, weight_decay=Hyper("lam"), **settings),  # type: ignore[arg-type]
        num_steps=400,
    )


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}], ids=str)
def test_a_step_knows_the_weight_decay_of_the_dynamics(settings: dict) -> None:
    """Peers differentiate a plain descent step whatever the rule; here the decay is the ridge penalty."""
    ridge = Ridge()
    found = grads(
        decayed(ridge, **settings), Implicit(solver=FixedPoint(max_iterations=500, tolerance=1e-13), map="step")
    )["lam"]
    torch.testing.assert_close(found, ridge.exact_hypergradient(scalar(0.3)), rtol=1e-10, atol=0)


def test_the_gradient_alone_does_not_know_it_and_says_so() -> None:
    with (
        pytest.warns(LinearSolveWarning, match=r"`stationarity` is .*use `map='step'` if the dynamics add what"),
        pytest.raises(IncompatibleBackendError, match=r"`hparams\['lam'\]` reaches the outer loss, but by no path"),
    ):
        grads(decayed(Ridge()), Implicit())


def test_a_learnt_learning_rate_is_refused_by_the_gradient_and_flat_for_a_step() -> None:
    ridge = Ridge()
    problem = ridge.problem(400)
    with pytest.raises(IncompatibleBackendError, match=r"`hparams\['eta'\]` reaches the outer loss, but by no path"):
        grads(problem, Implicit())
    found = grads(problem, EXACT["step"])
    assert abs(float(found["eta"])) < 1e-12  # the solution does not depend on it
    torch.testing.assert_close(found["lam"], ridge.exact_hypergradient(scalar(0.3)), rtol=1e-10, atol=0)


def test_of_a_schedule_a_step_uses_the_last_entry() -> None:
    ridge = Ridge()
    base = decayed(ridge)
    schedule = torch.full((400,), 0.3, dtype=F64)
    problem = ht.BilevelProblem(
        base.inner,
        LambdaOuter({"lam": schedule}, lambda p, h, b: ridge.outer_loss(p["w"])),
        dynamics=SGD(lr=0.2, weight_decay=Hyper("lam", per="step")),
        num_steps=400,
    )
    found = grads(problem, EXACT["step"])["lam"]
    assert not found[:-1].any()
    torch.testing.assert_close(found[-1], ridge.exact_hypergradient(scalar(0.3)), rtol=1e-10, atol=0)


def test_rules_of_torch_that_make_their_buffers_as_they_go() -> None:
    rule = ht.dynamics.TorchOptim(torch.optim.SGD, options={"lr": 0.4, "momentum": 0.5})
    ours = grads(softmax(SGD(lr=0.4, momentum=0.5), 120), EXACT["step"])
    assert_close(grads(softmax(rule, 120), EXACT["step"]), ours, 1e-9)


# --- paths ----------------------------------------------------------------------------------------------------------


def two_blocks(coupling: float, *, outer_reads: Callable[[TensorDict], Tensor]) -> ht.BilevelProblem:
    """`lam` is the target of `b`; `a` follows `b` as far as they are coupled; `idle` is read by nobody's loss."""
    return ht.BilevelProblem(
        LambdaInner(
            lambda h: {"a": scalar(0.1), "b": scalar(0.2), "idle": torch.ones(2, dtype=F64)},
            lambda p, h, b: (
                (p["a"] - 1.0) ** 2
                + (p["b"] - h["lam"]) ** 2
                + (coupling * (p["a"] - p["b"]) ** 2 if coupling else 0.0)
            ),
        ),
        LambdaOuter({"lam": scalar(0.7)}, lambda p, h, b: outer_reads(p)),
        dynamics=SGD(lr=0.2, momentum=0.3),
        num_steps=100,
    )


@maps
def test_a_hyperparameter_of_a_part_that_the_outer_loss_does_not_reach_is_detached(kind: str) -> None:
    problem = two_blocks(0.0, outer_reads=lambda p: p["a"] ** 2)
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['lam'\]` does not reach the outer loss"):
        grads(problem, EXACT[kind])


@maps
def test_a_path_through_another_param_is_followed(kind: str) -> None:
    """The outer loss reads `a` alone, whose equation holds `b`: a = (1 + k b) / (1 + k), b = (lam + k a) / (1 + k)."""
    problem = two_blocks(0.5, outer_reads=lambda p: p["a"] ** 2)
    a, slope = scalar((1 + 0.5 * 0.7 / 1.5) / (1.5 - 0.25 / 1.5)), scalar((0.5 / 1.5) / (1.5 - 0.25 / 1.5))
    torch.testing.assert_close(grads(problem, EXACT[kind])["lam"], 2 * a * slope, rtol=1e-10, atol=0)


@maps
def test_params_that_the_inner_loss_does_not_use_are_constants(kind: str) -> None:
    problem = two_blocks(0.5, outer_reads=lambda p: (p["a"] * p["idle"]).sum() + (p["idle"] ** 2).sum())
    expected = grads(problem, Reverse())
    for solver in (Dense(), FixedPoint(tolerance=1e-13, step_size=0.3 if kind == "gradient" else 1.0)):
        assert_close(grads(problem, replace(EXACT[kind], solver=solver)), expected, 1e-10)


@maps
def test_an_outer_loss_without_the_params_leaves_the_direct_term(kind: str) -> None:
    problem = two_blocks(0.5, outer_reads=lambda p: scalar(0.0))
    direct = ht.BilevelProblem(
        problem.inner, LambdaOuter({"lam": scalar(0.7)}, lambda p, h, b: h["lam"] ** 2), dynamics=problem.dynamics,
        num_steps=100,
    )  # fmt: skip
    result = ht.hypergradient(direct, direct.init_hparams(), backend=EXACT[kind])
    torch.testing.assert_close(result.grads["lam"], scalar(1.4))
    assert float(result.figures["linear_residual"]) == 0.0


@maps
def test_detached_and_dropped_hyperparameters_are_named(kind: str) -> None:
    def problem(use: str) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            LambdaInner(
                lambda h: {"w": h["start"] if use == "init" else torch.zeros((), dtype=F64)},
                lambda p, h, b: (p["w"] - h["c"].detach() if use == "detached" else p["w"] - h["c"]) ** 2,
            ),
            LambdaOuter({"c": scalar(0.4), "start": scalar(0.1)}, lambda p, h, b: p["w"] ** 2),
            dynamics=SGD(lr=0.3),
            num_steps=40,
            allow_unused=() if use == "init" else ("start",),
        )

    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['c'\]` does not reach the outer loss"):
        grads(problem("detached"), EXACT[kind])
    with pytest.raises(IncompatibleBackendError, match=r"`hparams\['start'\]` reaches the outer loss, but by no path"):
        grads(problem("init"), EXACT[kind])
    torch.testing.assert_close(grads(problem("loss"), EXACT[kind])["c"], scalar(0.8), rtol=1e-12, atol=0)


@maps
def test_running_statistics_are_constants(kind: str) -> None:
    """A buffer follows `w` towards `c`, and the outer loss reads both: its part is left out."""

    class Inner(ht.InnerProblem):
        buffers = ("mean",)

        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": torch.zeros((), dtype=F64), "mean": torch.zeros((), dtype=F64)}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
            return (params["w"] - hparams["c"]) ** 2, {"mean": 0.5 * params["mean"] + 0.5 * params["w"]}

    outer = LambdaOuter({"c": scalar(0.4)}, lambda p, h, b: p["w"] ** 2 + 3 * p["mean"])
    problem = ht.BilevelProblem(Inner(), outer, dynamics=SGD(lr=0.2, momentum=0.2), num_steps=100)
    result = ht.hypergradient(problem, problem.init_hparams(), backend=EXACT[kind])
    torch.testing.assert_close(result.grads["c"], scalar(0.8), rtol=1e-11, atol=0)
    torch.testing.assert_close(result.params["mean"], scalar(0.4), rtol=1e-11, atol=0)
    torch.testing.assert_close(grads(problem, Reverse())["c"], scalar(3.8), rtol=1e-9, atol=0)


@maps
def test_the_hypergradient_is_chained_through_a_context(kind: str) -> None:
    """Example weights computed once by a small map of what is learnt, with labels beside them."""
    plain = softmax(*LONG["momentum"])

    class Outer(SoftmaxOuter):
        def init_hparams(self) -> TensorDict:
            return {"raw": normal(3, seed=7), "log_l2": scalar(-1.0)}

    mixing = normal(12, 3, seed=8)

    def context(hparams: TensorDict, batch: Batch) -> TensorDict:
        return {"weights": torch.tanh(mixing @ hparams["raw"]) + hparams["log_l2"], "label": torch.arange(3)}

    problem = ht.BilevelProblem(
        plain.inner, Outer(), dynamics=plain.dynamics, num_steps=plain.num_steps, context=context
    )
    found = grads(problem, EXACT[kind])
    assert_close(found, grads(problem, Reverse()), 1e-8)
    raw, log_l2 = problem.init_hparams()["raw"], scalar(-1.0)
    weights = torch.tanh(mixing @ raw)
    inside = grads(plain, EXACT[kind], weights=weights + log_l2, log_l2=log_l2)
    torch.testing.assert_close(found["raw"], mixing.T @ (inside["weights"] * (1 - weights**2)), rtol=1e-9, atol=0)
    torch.testing.assert_close(found["log_l2"], inside["log_l2"] + inside["weights"].sum(), rtol=1e-9, atol=0)


# --- figures, warnings, costs ---------------------------------------------------------------------------------------


@maps
def test_a_run_that_has_not_arrived_is_reported(kind: str) -> None:
    """The measure is what is left of the way: here `rate^T` of one eigenvalue, whatever the units of the loss."""

    def problem(num_steps: int, unit: float) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            LambdaInner(lambda h: {"w": torch.zeros(3, dtype=F64)},
                        lambda p, h, b: unit * (p["w"] - h["c"]).square().sum() / 2),
            LambdaOuter({"c": normal(3, seed=1)}, lambda p, h, b: p["w"].square().sum()),
            dynamics=SGD(lr=0.5 / unit),
            num_steps=num_steps,
        )  # fmt: skip

    for unit in (1.0, 1e6):
        for num_steps, left in ((1, 0.5), (3, 0.125), (30, 0.5**30)):
            few = problem(num_steps, unit)
            result = ht.hypergradient(few, few.init_hparams(), backend=SILENT[kind])
            torch.testing.assert_close(result.figures["stationarity"], scalar(left), rtol=1e-4, atol=0)
    few = problem(3, 1.0)
    with pytest.warns(LinearSolveWarning, match=(
        r"`stationarity` is 1e-01, above `stationarity_tolerance` = 0.01: .*has no solution yet.*Take more inner steps"
    )) as caught:  # fmt: skip
        ht.hypergradient(few, few.init_hparams(), backend=EXACT[kind])
    assert caught[0].message.residual == pytest.approx(0.125)  # type: ignore[union-attr]
    ht.hypergradient(few, few.init_hparams(), backend=replace(EXACT[kind], stationarity_tolerance=0.126))


@maps
@pytest.mark.parametrize("num_steps", [1, 2, 6, 20])
def test_the_way_is_measured_from_where_the_run_began_though_it_gets_steeper_at_first(
    kind: str, num_steps: int
) -> None:
    """Down from near the top of `(w^2 - c)^2 / 4`, by hand: the slope is `w (w^2 - c)`."""
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.full((), 0.1, dtype=F64)}, lambda p, h, b: (p["w"] ** 2 - h["c"]) ** 2 / 4),
        LambdaOuter({"c": scalar(1.0)}, lambda p, h, b: p["w"] ** 3),
        dynamics=SGD(lr=0.3),
        num_steps=num_steps,
    )
    slopes, w = [], 0.1
    for _ in range(num_steps + 1):
        slopes.append(w * (w * w - 1.0))
        w -= 0.3 * slopes[-1]
    result = ht.hypergradient(problem, problem.init_hparams(), backend=SILENT[kind])
    torch.testing.assert_close(result.figures["stationarity"], scalar(slopes[-1] / slopes[0]), rtol=1e-9, atol=0)
    if num_steps == 6:
        assert float(result.figures["stationarity"]) > 1.0


def test_a_poor_solution_of_the_linear_system_is_reported() -> None:
    problem = softmax(SGD(lr=0.8), 100)
    hparams = problem.init_hparams()
    poor = Implicit(solver=ConjugateGradient(max_iterations=2), residual_tolerance=1e-4)
    with pytest.warns(LinearSolveWarning, match=(
        r"`linear_residual` is \de-0\d, above `residual_tolerance` = 0.0001: `ConjugateGradient\(max_iterations=2.*"
        r"off by it or more. Give it more iterations.*`residual_tolerance=None` accepts it"
    )) as caught:  # fmt: skip
        result = ht.hypergradient(problem, hparams, backend=poor)
    assert caught[0].message.residual == float(result.figures["linear_residual"]) > 1e-3  # type: ignore[union-attr]
    ht.hypergradient(problem, hparams, backend=replace(poor, residual_tolerance=None))
    diverging = Implicit(solver=FixedPoint(max_iterations=30, step_size=50.0))
    with pytest.warns(LinearSolveWarning, match="`linear_residual` is "):
        ht.hypergradient(problem, hparams, backend=diverging)


def test_one_task_that_is_badly_solved_is_enough_for_a_warning() -> None:
    family = Proximal(num_tasks=3)
    problem = family.problem(task_route="vmap")
    backend = Implicit(solver=ConjugateGradient(max_iterations=4, tolerance=1e-12), residual_tolerance=None)
    residuals = ht.hypergradient(problem, family.hparams, backend=backend).figures["linear_residual"]
    between = float(residuals.sort().values[1:].mean())
    with pytest.warns(LinearSolveWarning) as caught:
        ht.hypergradient(problem, family.hparams, backend=replace(backend, residual_tolerance=between))
    assert caught[0].message.residual == float(residuals.max())  # type: ignore[union-attr]


def test_the_same_warning_is_shown_once_though_its_numbers_differ_a_little() -> None:
    problem = softmax(SGD(lr=0.5), 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for shift in (0.0, 0.001, 0.002):
            grads(problem, Implicit(), log_l2=scalar(-2.0 + shift))
    assert len(caught) == 1


@maps
def test_a_warm_started_run_is_measured_by_its_longest_way(kind: str) -> None:
    """Three steps from where the last run ended are no failure to arrive, though little is gained in them."""
    problem = softmax(SGD(lr=0.8), 80, warm_start=True)
    hparams = problem.init_hparams()
    first = ht.hypergradient(problem, hparams, backend=EXACT[kind])
    short = replace(problem, num_steps=3)
    moved = {**hparams, "log_l2": hparams["log_l2"] + 1e-3}
    second = ht.hypergradient(short, moved, backend=EXACT[kind], carry=first.carry)
    assert float(second.figures["stationarity"]) < 1e-3
    for name in ("params.matrix", "stationarity.first", "index"):
        assert name in second.carry
    assert torch.equal(second.carry["stationarity.first"], first.carry["stationarity.first"])
    expected = grads(softmax(SGD(lr=0.8), 100), Reverse(), log_l2=moved["log_l2"])
    assert_close(second.grads, expected, 1e-2)
    other = ht.hypergradient(problem, hparams, backend=Reverse()).carry
    alone = ht.hypergradient(short, moved, backend=SILENT[kind], carry=other)
    assert float(alone.figures["stationarity"]) > 0.02


def test_a_cold_run_carries_nothing() -> None:
    problem = softmax(SGD(lr=0.8), 80)
    assert not ht.hypergradient(problem, problem.init_hparams(), backend=Implicit()).carry


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_warm_started_tasks_keep_their_own_measure(route: str) -> None:
    family = Proximal(num_tasks=3)
    problem = family.problem(task_route=route, warm_start=True, num_steps=60)
    first = ht.hypergradient(problem, family.hparams, backend=SILENT["gradient"])
    second = ht.hypergradient(problem, family.hparams, backend=SILENT["gradient"], carry=first.carry)
    assert first.carry["stationarity.first"].shape == (3,)
    assert torch.equal(second.carry["stationarity.first"], first.carry["stationarity.first"])
    assert bool((second.figures["stationarity"] < first.figures["stationarity"]).all())


@pytest.mark.parametrize("num_steps", [0, 1, 50])
def test_steps_and_products_are_counted(num_steps: int) -> None:
    problem = softmax(SGD(lr=0.5, momentum=0.3), num_steps)
    hparams = problem.init_hparams()
    measured = 1 if num_steps else 0
    quiet = {"residual_tolerance": None, "stationarity_tolerance": None}
    for solver, products in (
        (ConjugateGradient(max_iterations=4, tolerance=0.0), 5),
        (Neumann(num_terms=4), 4),
        (FixedPoint(max_iterations=4, tolerance=0.0), 4),
        (Nystrom(rank=4), 5),
        (Dense(), 16),
    ):
        stats = ht.hypergradient(problem, hparams, backend=Implicit(solver=solver, **quiet)).stats
        assert (stats.steps, stats.vjps) == (num_steps + 1 + measured, products + 1)
        assert (stats.stored_states, stats.graph_steps) == (1, 1)
    stats = ht.hypergradient(problem, hparams, backend=Implicit(solver=Neumann(num_terms=4), map="step", **quiet)).stats
    # Buffers are no part of the outer loss: one product finds out that they matter.
    assert (stats.steps, stats.vjps) == (num_steps + 2, 4 + 1 + 1)


@maps
def test_memory_does_not_grow_with_the_horizon(kind: str) -> None:
    def peak(num_steps: int) -> int:
        problem = softmax(SGD(lr=0.5, momentum=0.3), num_steps)
        hparams = problem.init_hparams()
        with PeakMemory() as memory:
            ht.hypergradient(problem, hparams, backend=SILENT[kind])
        return memory.peak

    # The losses of the inner steps are kept for the final check of finiteness: a number for each.
    assert peak(64) - peak(4) <= 60 * 2 * 8


class Watched(ht.GradientDynamics):
    """Gradient descent that counts how many of the params it has made are still held."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        new = {name: value - 0.5 * grads[name] for name, value in params.items()}
        self.made.append(weakref.ref(new["matrix"]))
        self.most = max(self.most, sum(item() is not None for item in self.made))
        return new, {}


@maps
def test_no_state_on_the_way_is_kept(kind: str) -> None:
    watched = Watched()
    problem = softmax(watched, 40)
    ht.hypergradient(problem, problem.init_hparams(), backend=SILENT[kind])
    assert len(watched.made) == (41 if kind == "step" else 40)
    assert watched.most <= 3


@maps
def test_no_graph_is_left_and_no_grad_is_written(kind: str) -> None:
    problem = softmax(SGD(lr=0.8), 80)
    hparams = {name: value.requires_grad_() for name, value in problem.init_hparams().items()}
    with torch.no_grad():
        result = ht.hypergradient(problem, hparams, backend=EXACT[kind])
    assert all(value.grad is None for value in hparams.values())
    values = [result.outer_loss, *result.grads.values(), *result.params.values(), *result.figures.values()]
    assert not any(value.requires_grad for value in values)
    torch.testing.assert_close(result.outer_loss, ht.unroll(problem, hparams).outer_loss)


def test_single_precision_is_enough_for_the_default_settings() -> None:
    a, y = normal(20, 5, seed=0).float(), normal(20, seed=1).float()
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.zeros(5)},
                    lambda p, h, b: (a @ p["w"] - y).square().mean() / 2 + h["lam"] * p["w"].square().sum() / 2),
        LambdaOuter({"lam": torch.tensor(0.3)}, lambda p, h, b: (p["w"] - 1.0).square().sum()),
        dynamics=SGD(lr=0.3),
        num_steps=150,
    )  # fmt: skip
    for backend in (Implicit(), Implicit(solver=FixedPoint(), map="step")):
        result = ht.hypergradient(problem, problem.init_hparams(), backend=backend)
        assert result.grads["lam"].dtype == result.figures["linear_residual"].dtype == torch.float32
        torch.testing.assert_close(result.grads, grads(problem, Reverse()), rtol=1e-4, atol=0)


# --- num_steps = 0 --------------------------------------------------------------------------------------------------


def test_without_a_step_a_rule_with_buffers_starts_them() -> None:
    ridge = Ridge()
    closed = ridge.closed_form_problem()
    for dynamics in (SGD(lr=0.2, momentum=0.5), ht.dynamics.Adam(lr=0.2, eps=0.5)):
        found = grads(replace(closed, dynamics=dynamics), EXACT["step"])["lam"]
        torch.testing.assert_close(found, ridge.exact_hypergradient(scalar(0.3)), rtol=1e-10, atol=0)


# --- refusals -------------------------------------------------------------------------------------------------------


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
