"""Momentum on integers: near the float rule, and back again bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hypertorch as ht
from hypertorch.dynamics.reversible import ExactState, reversible_rule
from hypertorch.dynamics.reversible.exact_arithmetic import LARGEST_NUMBER, LEAST_FACTOR
from hypertorch.types import TensorDict
from tests.helpers.problems import normal

F64 = torch.float64
Hyper = ht.Hyper
ReversibleMomentum = ht.dynamics.ReversibleMomentum
SHAPES = {"matrix": (4, 3), "bias": (3,)}
NUM_STEPS = 60


def first_params() -> TensorDict:
    return {name: normal(*shape, seed=position) for position, (name, shape) in enumerate(SHAPES.items())}


def gradient(params: TensorDict) -> TensorDict:
    """Of a bumpy function that couples all entries."""
    total = sum(value.sin().sum() for value in params.values())
    return {name: 0.3 * (value - 0.5) + torch.sin(3.0 * value) * total for name, value in params.items()}


def per_entry(seed: int, low: float, high: float, steps: int | None = None) -> dict[str, Tensor]:
    lead = () if steps is None else (steps,)
    return {
        name: low + (high - low) * (0.5 + 0.5 * normal(*lead, *shape, seed=seed).tanh())
        for name, shape in SHAPES.items()
    }


def _cases() -> dict[str, tuple[ht.Dynamics, TensorDict]]:
    return {
        "numbers": (ReversibleMomentum(lr=0.3, momentum=0.9), {}),
        "a number with a rest": (ReversibleMomentum(lr=0.3, momentum=0.8731), {}),
        "schedules": (
            ReversibleMomentum(
                lr=[0.1 + 0.005 * step for step in range(NUM_STEPS)],
                momentum=[0.5 + 0.008 * step for step in range(NUM_STEPS)],
            ),
            {},
        ),
        "a tensor": (ReversibleMomentum(lr=torch.tensor([0.1, 0.2, 0.3]), momentum=torch.tensor([0.3, 0.9, 0.99])), {}),
        "groups": (ReversibleMomentum(lr={"bias": 0.1, "*": 0.3}, momentum={"bias": 0.5, "*": Hyper("m")}), {"m": 0.7}),
        "learnt": (
            ReversibleMomentum(lr=Hyper("log_lr", torch.exp), momentum=Hyper("logit", torch.sigmoid)),
            {"log_lr": -1.0, "logit": 2.0},
        ),
        "learnt schedules": (
            ReversibleMomentum(lr=Hyper("lr", per="step"), momentum=Hyper("m", per="step")),
            {"lr": torch.linspace(0.1, 0.3, NUM_STEPS), "m": torch.linspace(0.3, 0.97, NUM_STEPS)},
        ),
        "learnt for every weight": (
            ReversibleMomentum(lr=Hyper("lr", per="parameter"), momentum=Hyper("m", per="parameter")),
            {
                **{f"lr.{name}": value for name, value in per_entry(5, 0.1, 0.3).items()},
                **{f"m.{name}": value for name, value in per_entry(6, 0.1, 0.99).items()},
            },
        ),
        "learnt for every weight and step": (
            ReversibleMomentum(lr=Hyper("lr"), momentum=Hyper("m", per="step,parameter")),
            {"lr": 0.2, **{f"m.{name}": value for name, value in per_entry(7, 0.1, 0.99, NUM_STEPS).items()}},
        ),
    }  # fmt: skip


CASES = _cases()


def hparams_of(case: str) -> TensorDict:
    """The outer variables as leaves, as a backend has them."""
    return {name: torch.as_tensor(value, dtype=F64).requires_grad_() for name, value in CASES[case][1].items()}


def started(rule: ht.Dynamics, hparams: TensorDict, num_steps: int, params: TensorDict | None = None) -> ExactState:
    params = params or first_params()
    assert isinstance(rule, ReversibleMomentum)
    return rule.start_exact(params, rule.init(params, hparams), hparams, range(num_steps))


def bits(exact: ExactState) -> list[Tensor]:
    return [value.clone() for value in (*exact.params.values(), *exact.buffers.values())]


def assert_equal_bits(exact: ExactState, expected: list[Tensor]) -> None:
    for value, first in zip(bits(exact), expected, strict=True):
        assert torch.equal(value, first)


@pytest.mark.parametrize("case", CASES)
def test_integers_follow_the_float_rule_and_come_back(case: str) -> None:
    rule, _ = CASES[case]
    hparams = hparams_of(case)
    exact = started(rule, hparams, NUM_STEPS)
    first = bits(exact)
    params, state = first_params(), rule.init(first_params(), hparams)
    for index in range(NUM_STEPS):
        rule.step_exact(exact, gradient, hparams, index)
        params, state = rule.update(gradient(params), params, state, hparams, index)
    for name, value in exact.float_params().items():
        torch.testing.assert_close(value, params[name].detach(), rtol=0.0, atol=1e-10)
    for name, value in exact.float_buffers().items():
        torch.testing.assert_close(value, state[name].detach(), rtol=0.0, atol=1e-10)
    assert all(not buffer.is_empty() for buffer in exact.information.values())
    for index in reversed(range(NUM_STEPS)):
        rule.unstep(exact, gradient, hparams, index)
    assert_equal_bits(exact, first)
    assert all(buffer.is_empty() for buffer in exact.information.values())


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.98, 0.99])
def test_a_thousand_steps_come_back_for_the_information_that_theory_asks(momentum: float) -> None:
    num_steps = 1000
    rule = ReversibleMomentum(lr=0.3, momentum=momentum)
    exact = started(rule, {}, num_steps, params={"w": normal(40, seed=0)})
    first = bits(exact)
    visited = []
    for index in range(num_steps):
        visited.append(exact.params["w"].clone())
        rule.step_exact(exact, gradient, {}, index)
    information = float(exact.information_bits(tasks_axis=False))
    assert information / num_steps == pytest.approx(-math.log2(momentum), rel=0.1)
    words = len(exact.information["velocity.w"].words)
    assert 64 + 32 * words <= -num_steps * math.log2(momentum) + 64
    for index in reversed(range(num_steps)):
        rule.unstep(exact, gradient, {}, index)
        assert torch.equal(exact.params["w"], visited.pop())
    assert_equal_bits(exact, first)
    assert exact.information["velocity.w"].is_empty()


def test_the_rule_is_that_of_the_paper() -> None:
    rule = ReversibleMomentum(lr=0.3, momentum=0.8)
    params, grads = first_params(), {name: normal(*shape, seed=9) for name, shape in SHAPES.items()}
    velocity = {f"velocity.{name}": normal(*shape, seed=8) for name, shape in SHAPES.items()}
    new_params, new_state = rule.update(grads, params, velocity, {}, 0)
    for name in SHAPES:
        expected = 0.8 * velocity[f"velocity.{name}"] - (1.0 - 0.8) * grads[name]
        torch.testing.assert_close(new_state[f"velocity.{name}"], expected, rtol=1e-14, atol=0.0)
        torch.testing.assert_close(new_params[name], params[name] + 0.3 * expected, rtol=1e-14, atol=0.0)


def test_torch_takes_the_same_steps_with_a_step_size_of_its_own() -> None:
    params = {name: value.clone().requires_grad_() for name, value in first_params().items()}
    optimizer = torch.optim.SGD(params.values(), lr=0.3 * (1.0 - 0.8), momentum=0.8)
    rule = ReversibleMomentum(lr=0.3, momentum=0.8)
    ours, state = first_params(), rule.init(first_params(), {})
    for index in range(20):
        for name, value in gradient({name: value.detach() for name, value in params.items()}).items():
            params[name].grad = value
        optimizer.step()
        ours, state = rule.update(gradient(ours), ours, state, {}, index)
    for name, value in params.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-9, atol=1e-10)


def test_a_first_velocity_of_its_own_comes_back() -> None:
    rule, params = ReversibleMomentum(lr=0.1, momentum=0.7), first_params()
    velocity = {f"velocity.{name}": normal(*shape, seed=4) for name, shape in SHAPES.items()}
    exact = rule.start_exact(params, velocity, {}, range(5))
    for name, value in exact.float_buffers().items():
        torch.testing.assert_close(value, velocity[name], rtol=0.0, atol=2.0**-53)
    first = bits(exact)
    for index in range(5):
        rule.step_exact(exact, gradient, {}, index)
    for index in reversed(range(5)):
        rule.unstep(exact, gradient, {}, index)
    assert_equal_bits(exact, first)


def test_another_gradient_does_not_lead_back() -> None:
    rule = ReversibleMomentum(lr=0.1, momentum=0.9)
    exact = started(rule, {}, 2)
    first = bits(exact)
    for index in range(2):
        rule.step_exact(exact, gradient, {}, index)

    def off_by_a_few_bits(params: TensorDict) -> TensorDict:
        return {name: value * (1.0 + 2.0**-48) for name, value in gradient(params).items()}

    for index in reversed(range(2)):
        rule.unstep(exact, off_by_a_few_bits, {}, index)
    assert not torch.equal(exact.buffers["velocity.matrix"], first[2])


def test_float32_params_are_seen_as_float32_and_come_back() -> None:
    rule = ReversibleMomentum(lr=Hyper("lr"), momentum=Hyper("m"))
    hparams = {"lr": torch.tensor(0.2), "m": torch.tensor(0.9)}
    exact = started(rule, hparams, 30, params={name: value.float() for name, value in first_params().items()})
    first = bits(exact)
    assert {value.dtype for value in exact.float_params().values()} == {torch.float32}
    assert {value.dtype for value in exact.float_buffers().values()} == {torch.float32}
    for index in range(30):
        rule.step_exact(exact, gradient, hparams, index)
    for index in reversed(range(30)):
        rule.unstep(exact, gradient, hparams, index)
    assert_equal_bits(exact, first)


def test_information_is_counted_for_every_task() -> None:
    rule = ReversibleMomentum(lr=0.1, momentum=0.5)
    exact = started(rule, {}, 40, params={"w": torch.stack([torch.zeros(7, dtype=F64), normal(7, seed=0)])})
    for index in range(40):
        rule.step_exact(exact, lambda params: {"w": params["w"].sin()}, {}, index)
    idle, busy = exact.information_bits(tasks_axis=True).tolist()
    assert idle == 0.0
    assert busy == pytest.approx(40.0, abs=3.0)
    assert float(exact.information_bits(tasks_axis=False)) == pytest.approx((idle + busy) / 2.0)


class _HostReads(TorchDispatchMode):
    """Counts operations that wait for the device to tell the host a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func.overloadpacket) in ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_no_step_reads_a_number_from_the_device(case: str) -> None:
    rule, _ = CASES[case]
    hparams = hparams_of(case)
    exact = started(rule, hparams, NUM_STEPS)
    with _HostReads() as reads:
        for index in range(NUM_STEPS):
            rule.step_exact(exact, gradient, hparams, index)
        for index in reversed(range(NUM_STEPS)):
            rule.unstep(exact, gradient, hparams, index)
        assert reads.count == 0
        float(exact.params["bias"].sum())
    assert reads.count == 1  # the counter counts


@pytest.mark.parametrize("constructed", [0.0, 1.0, -0.1, 1e-6, math.nan])
def test_a_momentum_that_cannot_be_reversed_is_refused(constructed: float) -> None:
    message = r"`momentum` of `ReversibleMomentum` is .*, outside .*At 0 a step forgets the velocity and cannot be reve"
    with pytest.raises(ValueError, match=message):
        ReversibleMomentum(lr=0.1, momentum=constructed)
    with pytest.raises(ValueError, match=message):
        ReversibleMomentum(lr=0.1, momentum=[0.9, constructed])
    with pytest.raises(ValueError, match=message):
        ReversibleMomentum(lr=0.1, momentum=torch.tensor([0.9, constructed], dtype=F64))


def test_other_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="`lr` of `ReversibleMomentum` is -0.1"):
        ReversibleMomentum(lr=-0.1)
    with pytest.raises(TypeError, match="neither a number"):
        ReversibleMomentum(lr=0.1, momentum="fast")


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-6, math.nan])
@pytest.mark.parametrize("per", ["one", "parameter", "step"])
def test_a_learnt_momentum_that_cannot_be_reversed_is_refused(value: float, per: Any) -> None:
    rule = ReversibleMomentum(lr=0.1, momentum=Hyper("m", per=per))
    schedule = torch.tensor([0.5, 0.5, value, 0.5], dtype=F64)
    hparams = {
        "one": {"m": torch.tensor(value, dtype=F64)},
        "parameter": {"m.bias": torch.tensor([0.5, value, 0.5]), "m.matrix": torch.tensor(0.5)},
        "step": {"m": schedule},
    }[per]
    where = {"one": "step 0", "parameter": "`bias` at inner step 0", "step": "step 2"}[per]
    with pytest.raises(ValueError, match=f"`momentum` of `ReversibleMomentum` is .*{where}, .*Learn it through a tran"):
        started(rule, hparams, 4)


def test_natural_constraints() -> None:
    constraints = ReversibleMomentum(lr=Hyper("lr"), momentum=Hyper("m", per="parameter")).constraints()
    assert isinstance(constraints["lr"], ht.Positive)
    momentum = constraints["m.*"]
    assert isinstance(momentum, ht.Box)
    for wild in (-1.0, 0.0, 1.0, 2.0):
        projected = float(momentum.project(torch.tensor(wild, dtype=F64)))
        assert LEAST_FACTOR <= projected < 1.0
        started(ReversibleMomentum(lr=0.1, momentum=projected), {}, 1)
    assert ReversibleMomentum(lr=Hyper("log_lr", torch.exp)).constraints() == {}


BIG = LARGEST_NUMBER


@pytest.mark.parametrize(
    ("lr", "first", "slope", "name"),
    [
        (0.1, 1.0, 1.2 * BIG, "gradient"),
        (0.1, BIG, 0.0, "param"),
        (10.0, 1.0, 0.3 * BIG, "update"),
        (0.9, 0.98 * BIG, -0.1 * BIG, "drift"),
        (0.1, 1.0, math.nan, "gradient"),
        (0.1, 1.0, math.inf, "gradient"),
    ],
)
def test_numbers_beyond_the_range_are_seen(lr: float, first: float, slope: float, name: str) -> None:
    rule = ReversibleMomentum(lr=lr, momentum=0.05)
    params = {"steady": torch.ones(2, dtype=F64), "wild": torch.tensor([0.0, first], dtype=F64)}

    def constant(params: TensorDict) -> TensorDict:
        return {"steady": torch.zeros(2, dtype=F64), "wild": torch.tensor([0.0, slope], dtype=F64)}

    exact = started(rule, {}, 3, params=params)
    assert list(exact.out_of_range()) == (["wild"] if name == "param" else [])
    for index in range(3):
        rule.step_exact(exact, constant, {}, index)
    assert list(exact.out_of_range()) == ["wild"]
    assert not exact.out_of_range()["wild"] < BIG


def test_a_step_size_that_is_not_a_number_is_seen() -> None:
    rule, hparams = ReversibleMomentum(lr=Hyper("lr")), {"lr": torch.tensor(math.nan, dtype=F64)}
    exact = started(rule, hparams, 1, params={"w": torch.ones(2, dtype=F64)})
    rule.step_exact(exact, gradient, hparams, 0)
    assert math.isnan(exact.out_of_range()["w"])


def test_numbers_just_within_the_range_come_back() -> None:
    rule = ReversibleMomentum(lr=0.9, momentum=0.9)
    params = {"w": torch.tensor([-0.99 * BIG, 0.99 * BIG, 0.0], dtype=F64)}
    slope = torch.tensor([0.9 * BIG, -0.9 * BIG, 0.0], dtype=F64)
    turns: list[Callable[[TensorDict], TensorDict]] = [
        lambda _: {"w": -slope},
        lambda _: {"w": slope},
        lambda _: {"w": -slope},
    ]
    exact = started(rule, {}, 3, params=params)
    first = bits(exact)
    for index in range(3):
        rule.step_exact(exact, turns[index], {}, index)
    assert exact.out_of_range() == {}
    for index in reversed(range(3)):
        rule.unstep(exact, turns[index], {}, index)
    assert_equal_bits(exact, first)


def test_params_without_entries_are_carried_along() -> None:
    rule = ReversibleMomentum(lr=0.1, momentum=0.9)
    exact = started(rule, {}, 1, params={"none": torch.zeros(0, dtype=F64), "one": torch.ones(1, dtype=F64)})
    rule.step_exact(exact, lambda params: params, {}, 0)
    assert exact.out_of_range() == {}
    rule.unstep(exact, lambda params: params, {}, 0)
    assert exact.params["one"].tolist() == [2**52]


def test_learnt_first_buffers_leave_the_rule_reversible() -> None:
    rule = ReversibleMomentum(lr=0.1)
    assert reversible_rule(rule) is rule
    assert reversible_rule(ht.dynamics.LearnedBuffers(rule)) is rule
    assert reversible_rule(ht.dynamics.SGD(lr=0.1)) is None
    assert reversible_rule(ht.dynamics.LearnedBuffers(ht.dynamics.SGD(lr=0.1, momentum=0.5))) is None
