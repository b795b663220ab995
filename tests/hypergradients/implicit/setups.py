"""Problems with known inner solutions, and the backend with every solver, for the tests of implicit differentiation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.linear_solvers import ConjugateGradient, Dense, FixedPoint, LinearSolver, Neumann, Nystrom
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import normal

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


LONG: dict[str, tuple[ht.Dynamics, int]] = {
    "SGD": (SGD(lr=0.8), 100),
    "momentum": (SGD(lr=0.4, momentum=0.5), 100),
    "Nesterov": (SGD(lr=0.4, momentum=0.5, nesterov=True), 100),
    "dampened": (SGD(lr=0.8, momentum=0.5, dampening=0.3), 120),
    "Adam": (ht.dynamics.Adam(lr=0.1, beta1=0.5, beta2=0.8, eps=0.2), 160),
    "RMSprop": (ht.dynamics.RMSprop(lr=0.1, alpha=0.8, eps=0.2), 160),
    "Groups": (ht.dynamics.Groups({"bias": SGD(lr=0.5), "*": SGD(lr=0.4, momentum=0.5)}), 120),
}


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
