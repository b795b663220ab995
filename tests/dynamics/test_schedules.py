"""Schedules against PyTorch's schedulers, stepped, to 1e-12."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import hypertorch as ht
from hypertorch.dynamics import schedules
from hypertorch.types import TensorDict
from tests.helpers.problems import normal

NUM_STEPS = 60


def stepped(make: Callable[[torch.optim.SGD], lr_scheduler.LRScheduler], num_steps: int = NUM_STEPS) -> tuple[Any, Any]:
    """Returns learning rate and momentum of every step, as PyTorch's scheduler sets them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3, momentum=0.9)
    scheduler = make(optimizer)
    rates, momenta = [], []
    for step in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if step + 1 < num_steps:
            scheduler.step()
    return rates, momenta


@pytest.mark.parametrize("steps_down", [None, 4, 11])
@pytest.mark.parametrize(("policy", "gamma"), [("triangular", 1.0), ("triangular2", 1.0), ("exp_range", 0.97)])
def test_cyclical_is_pytorchs(policy: schedules.Policy, gamma: float, steps_down: int | None) -> None:
    rates, momenta = stepped(
        lambda optimizer: lr_scheduler.CyclicLR(
            optimizer, base_lr=0.01, max_lr=0.4, step_size_up=7, step_size_down=steps_down, mode=policy, gamma=gamma,
            base_momentum=0.8, max_momentum=0.95,
        )
    )  # fmt: skip
    how: dict[str, Any] = {"steps_up": 7, "steps_down": steps_down, "policy": policy, "gamma": gamma}
    assert schedules.cyclical(NUM_STEPS, start=0.01, peak=0.4, **how) == pytest.approx(rates, rel=1e-12, abs=1e-14)
    assert schedules.cyclical(NUM_STEPS, start=0.95, peak=0.8, **how) == pytest.approx(momenta, rel=1e-12)


@pytest.mark.parametrize("num_steps", [7, NUM_STEPS, 101])
@pytest.mark.parametrize(("anneal", "torch_name"), [("cosine", "cos"), ("linear", "linear")])
@pytest.mark.parametrize(("three_phase", "share_up"), [(False, 0.3), (False, 0.9), (True, 0.3), (True, 0.45)])
def test_one_cycle_is_pytorchs(
    anneal: schedules.Anneal, torch_name: Any, three_phase: bool, share_up: float, num_steps: int
) -> None:
    rates, momenta = stepped(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.4, total_steps=num_steps, pct_start=share_up, anneal_strategy=torch_name,
            three_phase=three_phase, div_factor=10.0, final_div_factor=50.0, base_momentum=0.8, max_momentum=0.95,
        ),
        num_steps,
    )  # fmt: skip
    how: dict[str, Any] = {"share_up": share_up, "anneal": anneal, "three_phase": three_phase}
    found = schedules.one_cycle(num_steps, peak=0.4, start=0.04, end=0.0008, **how)
    assert found == pytest.approx(rates, rel=1e-12)
    found = schedules.one_cycle(num_steps, start=0.95, peak=0.8, end=0.95, **how)
    assert found == pytest.approx(momenta, rel=1e-12)


def test_one_cycle_has_pytorchs_defaults() -> None:
    rates, _ = stepped(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=NUM_STEPS))
    assert schedules.one_cycle(NUM_STEPS, peak=0.4) == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("half_period", [None, 20, 100])
def test_cosine_is_pytorchs(half_period: int | None) -> None:
    rates, _ = stepped(
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=half_period or NUM_STEPS, eta_min=0.002)
    )
    found = schedules.cosine(NUM_STEPS, start=0.3, end=0.002, half_period=half_period)
    assert found == pytest.approx(rates, rel=1e-12)


RATES = schedules.one_cycle(20, peak=0.4)
MOMENTA = schedules.one_cycle(20, start=0.95, peak=0.85, end=0.95)
LEARNT = {"lr": ht.Hyper("lr", per="step"), "momentum": ht.Hyper("momentum", per="step")}


@pytest.mark.parametrize("settings", [{"lr": RATES, "momentum": MOMENTA}, LEARNT])
def test_a_run_by_them_is_pytorchs(settings: dict[str, Any]) -> None:
    """Given as they are, and as the start of learnt schedules."""
    target, first = normal(4, seed=0), normal(4, seed=1)

    class Quadratic(ht.InnerProblem):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": first}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: object) -> torch.Tensor:
            return (params["w"] - target).square().sum() / 2

    class Sum(ht.OuterProblem):
        def init_hparams(self) -> TensorDict:
            return {"lr": first.new_tensor(RATES), "momentum": first.new_tensor(MOMENTA)}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: object) -> torch.Tensor:
            return params["w"].sum()

    problem = ht.BilevelProblem(Quadratic(), Sum(), dynamics=ht.dynamics.SGD(**settings), num_steps=20)
    weights = first.clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=20)
    for step in range(20):
        optimizer.zero_grad()
        ((weights - target).square().sum() / 2).backward()
        optimizer.step()
        if step < 19:
            scheduler.step()
    run = ht.unroll(problem, problem.init_hparams())
    torch.testing.assert_close(run.params["w"], weights.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.cyclical(0, start=0.1, peak=1.0, steps_up=2), "`num_steps` of `cyclical` is 0"),
        (lambda: schedules.cyclical(5, start=0.1, peak=1.0, steps_up=2.0), "`steps_up` of `cyclical` is 2.0"),  # type: ignore[arg-type]
        (lambda: schedules.cyclical(5, start=0.1, peak=1.0, steps_up=2, steps_down=0), "`steps_down` of `cyclical`"),
        (lambda: schedules.cyclical(5, start=math.nan, peak=1.0, steps_up=2), "`start` of `cyclical` is nan"),
        (lambda: schedules.cyclical(5, start=0.1, peak=math.inf, steps_up=2), "`peak` of `cyclical` is inf"),
        (lambda: schedules.cyclical(5, start=0.1, peak=1.0, steps_up=2, policy="sine"), "`policy` of .* is 'sine'"),  # type: ignore[arg-type]
        (lambda: schedules.cyclical(5, start=0.1, peak=1.0, steps_up=2, gamma=0.9), "it would do nothing"),
        (
            lambda: schedules.cyclical(5, start=0.1, peak=1.0, steps_up=2, policy="exp_range", gamma=1.1),
            "`gamma` of `cyclical` is 1.1",
        ),
        (lambda: schedules.one_cycle(True, peak=1.0), "`num_steps` of `one_cycle` is True"),
        (lambda: schedules.one_cycle(10, peak=math.nan), "`peak` of `one_cycle` is nan"),
        (lambda: schedules.one_cycle(10, peak=1.0, anneal="cos"), "`anneal` of `one_cycle` is 'cos'"),  # type: ignore[arg-type]
        # PyTorch divides by zero here.
        (lambda: schedules.one_cycle(10, peak=1.0, share_up=0.1), "Use a share between 0.1 and 1, or more steps"),
        (lambda: schedules.one_cycle(10, peak=1.0, share_up=1.0), "`share_up` of `one_cycle` is 1.0"),
        (lambda: schedules.one_cycle(10, peak=1.0, share_up=0.6, three_phase=True), "do not follow each other"),
        (lambda: schedules.one_cycle(10, peak=1.0, share_up=math.nan), "`share_up` of `one_cycle` is nan"),
        (lambda: schedules.cosine(10, start=1.0, half_period=0), "`half_period` of `cosine` is 0"),
        (lambda: schedules.cosine(10, start=1.0, end=math.inf), "`end` of `cosine` is inf"),
        (lambda: schedules.cosine(10, start=1e308, end=-1e308), "`start` of `cosine` is 1e.308"),
        (lambda: schedules.cosine(10, start=10**400), "`start` of `cosine` is 1000.* Pass a finite one, below 1e.300"),
    ],
)
def test_what_is_no_schedule_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


SCHEDULES: dict[str, tuple[Callable[..., object], dict[str, float]]] = {
    "cyclical": (schedules.cyclical, {"start": 0.1, "peak": 1.0, "steps_up": 2, "gamma": 1.0}),
    "one_cycle": (schedules.one_cycle, {"start": 0.1, "peak": 1.0, "end": 0.1, "share_up": 0.3}),
    "cosine": (schedules.cosine, {"start": 1.0, "end": 0.1}),
}


@pytest.mark.parametrize("value", ["a", True, [0.1], torch.tensor(0.1), 1j])
@pytest.mark.parametrize(
    ("function", "argument"),
    [(name, key) for name, (_, numbers) in SCHEDULES.items() for key in numbers if key != "steps_up"],
)
def test_what_is_no_number_is_refused(function: str, argument: str, value: object) -> None:
    call, numbers = SCHEDULES[function]
    call(10, **numbers)
    with pytest.raises(TypeError, match=rf"`{argument}` of `{function}` is .*, a `{type(value).__name__}`"):
        call(10, **{**numbers, argument: value})


def test_a_number_of_numpy_is_computed_with_in_double_precision() -> None:
    values = schedules.cosine(3, start=np.float32(0.5), end=np.int64(0))  # type: ignore[arg-type]
    assert values == schedules.cosine(3, start=0.5) and all(type(value) is float for value in values)


def test_a_peak_is_needed_and_a_switch_is_on_or_off() -> None:
    no_number: Any = None
    with pytest.raises(TypeError, match="`peak` of `one_cycle` is None"):
        schedules.one_cycle(10, peak=no_number)
    no_switch: Any = "no"
    with pytest.raises(TypeError, match="`three_phase` is 'no', which is neither True nor False"):
        schedules.one_cycle(10, peak=1.0, three_phase=no_switch)
