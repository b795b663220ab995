"""What the rule of the dynamics knows, and what has no path, under implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import (
    DetachedHyperparameterError,
    IncompatibleBackendError,
    LinearSolveWarning,
)
from hypertorch.linear_solvers import Dense, FixedPoint
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge, normal
from tests.hypergradients.implicit.setups import (
    EXACT,
    F64,
    LONG,
    SGD,
    Hyper,
    Implicit,
    Reverse,
    SoftmaxOuter,
    assert_close,
    grads,
    maps,
    scalar,
    softmax,
)


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
def test_a_buffer_between_two_params_keeps_its_place(kind: str) -> None:
    """Tensors of two states are paired by their order, and a rule returns the params without the buffers."""

    class Inner(ht.InnerProblem):
        buffers = ("mean",)

        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {name: torch.zeros((), dtype=F64) for name in ("v", "mean", "w")}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
            loss = (params["v"] - hparams["c"]) ** 2 + (params["w"] - params["v"]) ** 2
            return loss, {"mean": 0.5 * params["mean"] + 0.5 * params["w"]}

    outer = LambdaOuter({"c": scalar(0.4)}, lambda p, h, b: p["v"] ** 2 + 2 * p["w"])
    problem = ht.BilevelProblem(Inner(), outer, dynamics=SGD(lr=0.2, momentum=0.2), num_steps=200)
    assert list(ht.unroll(problem, problem.init_hparams()).params) == ["v", "mean", "w"]
    torch.testing.assert_close(grads(problem, EXACT[kind])["c"], scalar(0.8 + 2.0), rtol=1e-9, atol=0)


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
