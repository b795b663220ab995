"""Lion against its paper, written out, and what a sign leaves of a hypergradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import hypertorch as ht
from hypertorch.errors import DetachedHyperparameterError
from hypertorch.types import Batch, TensorDict
from tests.dynamics.leaves import F64
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

Lion, Hyper = ht.dynamics.Lion, ht.Hyper
backends = ht.hypergradients
START, TARGET = normal(6, seed=1), 0.1 * normal(6, seed=2)


def bowl(settings: dict, num_steps: int) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": START}, lambda p, h, b: (p["w"] - TARGET).pow(4).sum() / 4),
        LambdaOuter({"idle": torch.zeros((), dtype=F64)}, lambda p, h, b: p["w"].sum()),
        dynamics=Lion(**settings),
        num_steps=num_steps,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.05},
        {"lr": 0.05, "weight_decay": 0.3},
        {"lr": 0.05, "beta1": 0.6, "beta2": 0.8, "weight_decay": 0.1},
        {"lr": 0.05, "beta1": 0.0, "beta2": 1.0},
        {"lr": 0.01, "beta1": 0.7, "maximize": True},
    ],
    ids=str,
)
def test_values_are_those_of_algorithm_2(settings: dict) -> None:
    """Coordinate by coordinate in Python's numbers; the run passes the minimum, so that signs change."""
    lr, beta1, beta2 = settings["lr"], settings.get("beta1", 0.9), settings.get("beta2", 0.99)
    lam, up = settings.get("weight_decay", 0.0), -1.0 if settings.get("maximize") else 1.0
    expected, flips = [], 0
    for theta, target in zip(START.tolist(), TARGET.tolist(), strict=True):
        m, before = 0.0, None
        for _ in range(40):
            g = up * (theta - target) ** 3
            c = beta1 * m + (1 - beta1) * g
            sign = (c > 0) - (c < 0)
            theta = theta - lr * (sign + lam * theta)
            m = beta2 * m + (1 - beta2) * g
            flips += before is not None and sign != before
            before = sign
        expected.append(theta)
    problem = bowl(settings, 40)
    params = ht.unroll(problem, problem.init_hparams()).params
    torch.testing.assert_close(params["w"], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)
    assert flips > 0 or settings.get("maximize")


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


LEARNT: dict[str, tuple[ht.Dynamics, TensorDict]] = {
    "one value": (Lion(lr=Hyper("lr"), weight_decay=Hyper("wd")), {"lr": scalar(0.02), "wd": scalar(0.3)}),
    "learning rate alone": (Lion(lr=Hyper("lr")), {"lr": scalar(0.02)}),
    "no weight decay yet": (Lion(lr=0.02, weight_decay=Hyper("wd")), {"wd": scalar(0.0)}),
    "schedules": (
        Lion(lr=Hyper("lr", per="step"), weight_decay=Hyper("wd", per="step"), beta1=[0.9, 0.5, 0.8, 0.9, 0.9, 0.7]),
        {"lr": 0.02 * normal(6, seed=3).sigmoid(), "wd": 0.3 * normal(6, seed=4).sigmoid()},
    ),
    "per parameter": (
        Lion(lr=Hyper("lr", per="step,parameter"), weight_decay=Hyper("wd", per="parameter"), maximize=True),
        {
            "lr.first": 0.02 * normal(6, 4, 6, seed=5).sigmoid(),
            "lr.second": 0.02 * normal(6, 6, 3, seed=6).sigmoid(),
            "wd.first": 0.3 * normal(4, 6, seed=7).sigmoid(),
            "wd.second": 0.3 * normal(6, 3, seed=8).sigmoid(),
        },
    ),
    "groups": (Lion(lr={"first": Hyper("a"), "*": Hyper("b")}), {"a": scalar(0.02), "b": scalar(0.01)}),
}


def with_weights_unused(rule: ht.Dynamics, extra: TensorDict) -> ht.BilevelProblem:
    return replace(net_problem(rule, extra, num_steps=6), allow_unused=("weights",))


@pytest.mark.parametrize("case", LEARNT)
@pytest.mark.parametrize(
    "backend",
    [
        backends.Reverse(),
        backends.Reverse(checkpoint_every=2),
        backends.Reverse(derivative="mixed"),
        backends.Forward(),
    ],
    ids=repr,
)
def test_hypergradients_equal_central_differences(case: str, backend: ht.Hypergradient) -> None:
    problem = with_weights_unused(*LEARNT[case])
    hparams = problem.init_hparams()
    # Short moves: none may take an entry across the jump of its sign.
    check = ht.check_hypergradient(problem, hparams, backend, step_size=1e-7, num_directions=1)
    assert check.passed, str(check)
    grads = ht.hypergradient(problem, hparams, backend=backend).grads
    # The inner loss reads both; the outer loss reads one of them.
    assert not grads["weights"].any()
    torch.testing.assert_close(grads["log_l2"], 0.02 * hparams["log_l2"], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "backend",
    [
        backends.Reverse(),
        backends.Reverse(checkpoint_every=1),
        backends.Reverse(derivative="mixed"),
        backends.Reverse(snapshots=2),
        backends.Truncated(window=2),
        backends.Forward(),
        backends.Forward(chunk_size=1),
        backends.FirstOrder(),
        backends.ForwardGradient(),
    ],
    ids=repr,
)
def test_what_acts_through_the_sign_alone_is_refused(backend: ht.Hypergradient) -> None:
    problem = net_problem(Lion(lr=0.02), {}, num_steps=4)
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['weights'\]` does not reach the outer loss"):
        ht.hypergradient(problem, problem.init_hparams(), backend=backend)


def test_a_learnt_first_momentum_is_refused() -> None:
    start = {f"buffers.exp_avg.{name}": torch.zeros(*shape, dtype=F64) for name, shape in
             {"first": (4, 6), "second": (6, 3)}.items()}  # fmt: skip
    problem = with_weights_unused(ht.dynamics.LearnedBuffers(Lion(lr=0.02)), start)
    with pytest.raises(DetachedHyperparameterError, match="buffers.exp_avg.first.*does not reach"):
        ht.hypergradient(problem, problem.init_hparams(), backend=backends.Reverse())


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize(
    "setting", [Hyper("beta"), {"first": 0.9, "*": Hyper("beta", torch.sigmoid)}], ids=["alone", "in a group"]
)
def test_learnt_betas_are_refused(name: str, setting: object) -> None:
    message = (
        rf"`{name}` of `Lion` is .*Hyper.*its hypergradient is exactly zero: it acts through the sign.*as a number"
    )
    with pytest.raises(ValueError, match=message):
        Lion(**{name: setting})


def test_a_coordinate_without_a_gradient_stays_or_decays() -> None:
    class PartlyUsed(ht.InnerProblem):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": hparams["start"], "unused": hparams["start"]}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> torch.Tensor:
            return (params["w"][:3] - 5.0).square().sum()

    def problem(rule: ht.Dynamics, extra: TensorDict) -> ht.BilevelProblem:
        outer = LambdaOuter({"start": START, **extra}, lambda p, h, b: p["w"].square().sum() + p["unused"].sum())
        return ht.BilevelProblem(PartlyUsed(), outer, dynamics=rule, num_steps=4)

    still = problem(Lion(lr=0.1), {})
    params = ht.unroll(still, still.init_hparams()).params
    assert torch.equal(params["w"][3:], START[3:]) and torch.equal(params["unused"], START)
    assert not torch.equal(params["w"][:3], START[:3])
    learnt = problem(Lion(lr=Hyper("lr"), weight_decay=Hyper("wd")), {"lr": scalar(0.1), "wd": scalar(0.2)})
    params = ht.unroll(learnt, learnt.init_hparams()).params
    torch.testing.assert_close(params["unused"], (1 - 0.1 * 0.2) ** 4 * START, rtol=1e-12, atol=0)
    check = ht.check_hypergradient(learnt, learnt.init_hparams(), backends.Reverse())
    assert check.passed, str(check)


def test_vectorised_tasks_equal_a_loop_over_tasks() -> None:
    problem = task_problem(nn.Linear(3, 2).double(), item=(3,), num_tasks=2, num_steps=3, way=2)
    problem = replace(problem, dynamics=Lion(lr=Hyper("lr"), weight_decay=0.1))
    hparams = problem.init_hparams()
    vectorised, looped = (
        ht.hypergradient(problem, hparams, backend=backends.Reverse(), execution=ht.Execution(tasks=route)).grads
        for route in ("vmap", "loop")
    )
    for name in hparams:
        torch.testing.assert_close(vectorised[name], looped[name], rtol=1e-12, atol=1e-14)


def test_natural_constraints() -> None:
    constraints = Lion(lr=Hyper("lr"), weight_decay=Hyper("wd")).constraints()
    assert {name: float(own.project(torch.tensor(-0.3))) >= 0.0 for name, own in constraints.items()} == {
        "lr": True,
        "wd": True,
    }
