"""Params that a step computes from each other: the gradient at the next step is partial in each all the same."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, normal


class OneAfterTheOther(ht.dynamics.SGD):
    """Descends, and then moves the second parameter towards the new first one."""

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        new, state = super().update(grads, params, state, hparams, index)
        return {"first": new["first"], "second": 0.5 * (new["second"] + new["first"])}, state


@dataclass(frozen=True, kw_only=True, eq=False)
class Alike(ht.dynamics.SGD):
    """Gives both parameters the same tensor."""

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        new, state = super().update(grads, params, state, hparams, index)
        return {"first": new["first"], "second": new["first"]}, state


def problem(dynamics: ht.Dynamics) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        LambdaInner(
            lambda h: {"first": h["start"], "second": h["start"]},
            lambda p, h, b: (p["first"].sin() * p["second"] * h["weight"]).sum() + p["second"].square().sum(),
        ),
        LambdaOuter(
            {"start": normal(3, seed=1), "weight": normal(3, seed=2)},
            lambda p, h, b: (p["first"] + p["second"].cos()).square().sum(),
        ),
        dynamics=dynamics,
        num_steps=4,
    )


@pytest.mark.parametrize("dynamics", [OneAfterTheOther(lr=0.1), Alike(lr=0.1), ht.dynamics.SGD(lr=0.1)])
@pytest.mark.parametrize("backend", [ht.hypergradients.Reverse(), ht.hypergradients.Forward()])
def test_hypergradient_is_right(dynamics: ht.Dynamics, backend: ht.Hypergradient) -> None:
    chosen = problem(dynamics)
    assert ht.check_hypergradient(chosen, chosen.init_hparams(), backend).passed


def test_it_is_said_by_each_class_for_itself() -> None:
    assert ht.dynamics.SGD.separate_params and ht.dynamics.Adam.separate_params
    assert not OneAfterTheOther.separate_params and not ht.dynamics.Groups.separate_params


@pytest.mark.parametrize(
    "rule", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "RMSprop", "Lion", "ReversibleMomentum"]
)
def test_rules_that_go_entry_by_entry_save_the_view(rule: str) -> None:
    assert getattr(ht.dynamics, rule).separate_params is True
