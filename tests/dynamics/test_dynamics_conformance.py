"""Every dynamics against `torch.optim` on values and against central differences on every setting."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal

F64 = torch.float64
Reverse = ht.hypergradients.Reverse
SGD = ht.dynamics.SGD

# (ours, torch's); a leaf that is exported and missing here fails `test_every_leaf_is_listed`.
TORCH_OPTIM: dict[type[ht.Dynamics], tuple[type[torch.optim.Optimizer], list[dict]]] = {
    SGD: (
        torch.optim.SGD,
        [
            {"lr": 0.1},
            {"lr": 0.1, "weight_decay": 0.05},
            {"lr": 0.1, "momentum": 0.9},
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
            {"lr": 0.1, "momentum": 0.9, "nesterov": True},
            {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
            {"lr": 0.01, "momentum": 0.5, "maximize": True},
            {"lr": 0.01, "momentum": 0.5, "maximize": True, "weight_decay": 0.05},
        ],
    )
}
CASES = [(leaf, settings) for leaf, (_, choices) in TORCH_OPTIM.items() for settings in choices]
# First values of settings that are learnt, for the hypergradient.
LEARNT: dict[type[ht.Dynamics], list[dict[str, float]]] = {
    SGD: [
        {"lr": 0.2},
        {"lr": 0.2, "weight_decay": 0.03},
        {"lr": 0.2, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.03},
        {"lr": 0.2, "momentum": 0.7, "weight_decay": 0.03},
    ]
}


def test_every_leaf_is_listed() -> None:
    exported = {getattr(ht.dynamics, name) for name in ht.dynamics.__all__}
    leaves = {
        item
        for item in exported
        if isinstance(item, type) and issubclass(item, ht.Dynamics) and not getattr(item, "__abstractmethods__", None)
    }
    assert leaves == set(TORCH_OPTIM) == set(LEARNT)


def loss_of(params: TensorDict) -> Tensor:
    inputs = normal(8, 4, seed=1)
    hidden = torch.tanh(inputs @ params["first"])
    return (hidden @ params["second"]).square().mean() + params["second"].sum().sin()


@pytest.mark.parametrize(("leaf", "settings"), CASES, ids=str)
def test_values_equal_torch_optim_over_20_steps(leaf: type[ht.Dynamics], settings: dict) -> None:
    start = {"first": normal(4, 5, seed=2), "second": normal(5, 2, seed=3), "unused": normal(3, seed=4)}
    theirs = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = TORCH_OPTIM[leaf][0](theirs.values(), **settings)
    for _ in range(20):
        optimizer.zero_grad()
        (loss_of(theirs) + 0.0 * theirs["unused"].sum()).backward()
        optimizer.step()
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: start, lambda p, h, b: loss_of(p)),
        LambdaOuter({"idle": torch.zeros((), dtype=F64)}, lambda p, h, b: p["first"].sum()),
        dynamics=leaf(**settings),
        num_steps=20,
    )
    ours = ht.unroll(problem, problem.init_hparams()).params
    for name in start:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-12, atol=1e-12)


def hyper_tensors(values: dict[str, float]) -> TensorDict:
    return {name: torch.tensor(value, dtype=F64) for name, value in values.items()}


LEARNT_CASES = [(leaf, values) for leaf, choices in LEARNT.items() for values in choices]


@pytest.mark.parametrize(("leaf", "values"), LEARNT_CASES, ids=str)
@pytest.mark.parametrize("every", [None, 2])
def test_hypergradient_of_every_setting(leaf: type[ht.Dynamics], values: dict[str, float], every: int | None) -> None:
    dynamics = leaf(**{name: ht.Hyper(name) for name in values})
    problem = net_problem(dynamics, hyper_tensors(values))
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(checkpoint_every=every))
    assert check.passed, str(check)


def test_hypergradient_of_nesterov() -> None:
    dynamics = SGD(lr=ht.Hyper("lr"), momentum=ht.Hyper("momentum"), nesterov=True)
    problem = net_problem(dynamics, hyper_tensors({"lr": 0.2, "momentum": 0.7}))
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse())
    assert check.passed, str(check)


@pytest.mark.parametrize("leaf", TORCH_OPTIM)
def test_hypergradient_of_schedules_and_per_parameter_settings(leaf: type[ht.Dynamics]) -> None:
    num_steps = 5
    extra = {
        "log_lr": torch.linspace(-2.0, -1.0, num_steps, dtype=F64),
        "momentum.first": 0.5 + 0.1 * normal(num_steps, 4, 6, seed=5).tanh(),
        "momentum.second": torch.full((num_steps,), 0.4, dtype=F64),
        "decay.first": 0.01 + 0.01 * normal(4, 6, seed=6).square(),
        "decay.second": torch.tensor(0.02, dtype=F64),
    }
    dynamics = leaf(
        lr=ht.Hyper("log_lr", torch.exp, per="step"),
        momentum=ht.Hyper("momentum", per="step,parameter"),
        weight_decay=ht.Hyper("decay", per="parameter"),
    )
    problem = net_problem(dynamics, extra, num_steps=num_steps)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse())
    assert check.passed, str(check)


def test_a_float_schedule_equals_the_same_schedule_learnt() -> None:
    schedule = [0.3, 0.1, 0.2, 0.05]
    fixed = net_problem(SGD(lr=schedule), {}, num_steps=4)
    learnt = net_problem(SGD(lr=ht.Hyper("lr", per="step")), {"lr": torch.tensor(schedule, dtype=F64)}, num_steps=4)
    a = ht.hypergradient(fixed, fixed.init_hparams(), backend=Reverse())
    b = ht.hypergradient(learnt, learnt.init_hparams(), backend=Reverse())
    for name in a.grads:
        torch.testing.assert_close(a.grads[name], b.grads[name], rtol=1e-13, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_exactly_zero_gradients_have_finite_derivatives(momentum: float) -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["w0"]}, lambda p, h, b: (p["w"] * torch.tensor([1.0, 0.0])).square().sum()),
        LambdaOuter(
            {"w0": torch.tensor([1.0, 2.0], dtype=F64), "lr": torch.tensor(0.1, dtype=F64)},
            lambda p, h, b: p["w"].square().sum(),
        ),
        dynamics=SGD(lr=ht.Hyper("lr"), momentum=momentum),
        num_steps=4,
    )
    result = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())
    assert all(torch.isfinite(value).all() for value in result.grads.values())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, r"`lr` of `SGD` is -0.1, outside \[0.0, inf\]"),
        ({"lr": float("nan")}, ValueError, "`lr` of `SGD` is nan"),
        ({"lr": "0.1"}, TypeError, "`lr` of `SGD` is '0.1', which is neither a number"),
        ({"lr": [0.1, -0.1]}, ValueError, "`lr` of `SGD` is -0.1"),
        ({"lr": 0.1, "momentum": 1.5}, ValueError, r"`momentum` of `SGD` is 1.5, outside \[0.0, 1.0\]"),
        ({"lr": 0.1, "dampening": -1.0}, ValueError, "`dampening` of `SGD` is -1.0"),
        ({"lr": 0.1, "weight_decay": -1.0}, ValueError, "`weight_decay` of `SGD` is -1.0"),
        ({"lr": 0.1, "nesterov": True}, ValueError, "`nesterov` is True with momentum 0.0"),
        ({"lr": 0.1, "nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "undamped"),
    ],
)
def test_wrong_settings_are_explained(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SGD(**settings)


def test_an_unknown_kind_of_hyper_is_explained() -> None:
    with pytest.raises(ValueError, match=r"`per` of `Hyper\('lr'\)` is 'layer'.*Use None"):
        ht.Hyper("lr", per="layer")  # type: ignore[arg-type]


def test_natural_constraints_cover_settings_learnt_directly() -> None:
    dynamics = SGD(
        lr=ht.Hyper("lr", per="parameter"), momentum=ht.Hyper("m"), weight_decay=ht.Hyper("d", transform=torch.exp)
    )
    constraints = dynamics.constraints()
    assert set(constraints) == {"lr.*", "m"}
    assert constraints["m"].project(torch.tensor(1.3)) < 1.0
    assert constraints["lr.*"].project(torch.tensor(-1.0)) > 0.0


def test_settings_are_fields() -> None:
    for leaf in TORCH_OPTIM:
        names = {field.name for field in fields(leaf)}  # type: ignore[arg-type]
        assert set(leaf(lr=0.1).settings()) <= names  # type: ignore[call-arg]
