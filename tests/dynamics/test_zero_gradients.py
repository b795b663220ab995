"""Coordinates whose gradient is exactly zero, always or at some steps: where the root of a sum of squares bends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.types import Batch, TensorDict
from tests.dynamics.leaves import F64, LEARNT, Adagrad, Adam, AdamW, Learnt, NAdam, RAdam, RMSprop
from tests.helpers.problems import LambdaOuter, normal

Reverse = ht.hypergradients.Reverse
NUM_STEPS = 8  # RAdam divides by a root from the sixth on
# Which of the coordinates have a gradient at each step: always, never, not at first, at first only, now and then.
USED = torch.tensor([[1, 0, 0, 1, 1], *[[1, 0, 1, 0, 0]] * 2, [1, 0, 1, 0, 1], *[[1, 0, 1, 0, 0]] * 4], dtype=F64)
SETTINGS = [
    *LEARNT,
    # The epsilons of `torch.optim`, which are too small to be moved by a central difference.
    Learnt(Adam, {"lr": 0.05, "beta1": 0.8, "beta2": 0.9}, step_size=1e-4),
    Learnt(Adam, {"lr": 0.05, "beta1": 0.8, "beta2": 0.9}, {"amsgrad": True}, step_size=1e-5),
    Learnt(AdamW, {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.3}, step_size=1e-4),
    Learnt(NAdam, {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "momentum_decay": 0.1}, step_size=1e-4),
    Learnt(RAdam, {"lr": 0.05, "beta1": 0.8, "beta2": 0.9}, step_size=1e-4),
    Learnt(RAdam, {"lr": 0.05, "beta1": 0.8}, step_size=1e-4),
    Learnt(RMSprop, {"lr": 0.02, "alpha": 0.8, "momentum": 0.5}, step_size=1e-4),
    Learnt(RMSprop, {"lr": 0.02, "alpha": 0.8}, {"centered": True}, step_size=1e-4),
    Learnt(Adagrad, {"lr": 0.1, "lr_decay": 0.2}, step_size=1e-4),
]


class PartlyUsed(ht.InnerProblem):
    """A bowl with a slope of at most about 1, in the coordinates that a step uses."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["start"]}

    def batch(self, step: int) -> Batch:
        return USED[step]

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        distance = params["w"] - hparams["target"]
        return (batch * ((1.0 + distance.square()).sqrt() + 0.1 * distance.sin())).sum()


def partly_used(dynamics: ht.Dynamics, extra: TensorDict) -> ht.BilevelProblem:
    hparams = {"start": normal(5, seed=1), "target": normal(5, seed=2) + 3.0, **extra}
    return ht.BilevelProblem(
        PartlyUsed(),
        LambdaOuter(hparams, lambda p, h, b: (p["w"] - 1.0).square().sum() + (p["w"] * normal(5, seed=3)).sum()),
        dynamics=dynamics,
        num_steps=NUM_STEPS,
    )


@pytest.mark.parametrize("learnt", SETTINGS, ids=str)
def test_hypergradients_equal_central_differences(learnt: Learnt) -> None:
    problem = partly_used(*learnt.rule())
    hparams = problem.init_hparams()
    check = ht.check_hypergradient(problem, hparams, Reverse(), step_size=learnt.step_size)
    assert check.passed, str(check)
    result = ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=2))
    if "weight_decay" not in learnt.values and learnt.leaf is not AdamW:
        direct = 2.0 * (hparams["start"][1] - 1.0) + normal(5, seed=3)[1]
        assert result.params["w"][1] == hparams["start"][1]
        torch.testing.assert_close(result.grads["start"][1], direct, rtol=1e-12, atol=0)
        assert result.grads["target"][1] == 0.0


@pytest.mark.parametrize("learnt", SETTINGS, ids=str)
def test_values_per_weight_have_finite_hypergradients_and_none_where_nothing_moves(learnt: Learnt) -> None:
    dynamics, extra = learnt.detailed_rule({"w": (5,)}, NUM_STEPS)
    problem = partly_used(dynamics, extra)
    grads = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse()).grads
    assert all(torch.isfinite(value).all() for value in grads.values())
    if "weight_decay" not in learnt.values and learnt.leaf is not AdamW:
        for name in extra:
            assert not name.endswith(".w") or bool((grads[name][..., 1] == 0.0).all())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own, in jvp
@pytest.mark.parametrize("learnt", SETTINGS, ids=str)
def test_second_derivatives_and_forward_mode_are_finite_and_right(learnt: Learnt) -> None:
    dynamics, settings = learnt.rule()
    start, target = normal(5, seed=1), normal(5, seed=2) + 3.0

    def figure(start: Tensor, settings: TensorDict) -> Tensor:
        params, state = {"w": start}, dynamics.init({"w": start}, settings)
        for index in range(NUM_STEPS):
            grads = {"w": USED[index] * (params["w"] - target)}
            params, state = dynamics.update(grads, params, state, settings, index)  # type: ignore[attr-defined]
        return (params["w"] * normal(5, seed=3)).sum()

    gradient = torch.func.grad(figure, (0, 1))
    along = (torch.ones(5, dtype=F64), {name: torch.ones((), dtype=F64) for name in settings})
    start_grad, settings_grad = gradient(start, settings)
    _, forward = torch.func.jvp(figure, (start, settings), along)
    torch.testing.assert_close(forward, start_grad.sum() + sum(settings_grad.values()), rtol=1e-11, atol=1e-13)

    _, (second, second_settings) = torch.func.jvp(gradient, (start, settings), along)
    move = 1e-6
    ahead, behind = (
        gradient(start + sign * move, {name: value + sign * move for name, value in settings.items()})
        for sign in (1.0, -1.0)
    )
    torch.testing.assert_close(second, (ahead[0] - behind[0]) / (2 * move), rtol=1e-4, atol=1e-4)
    for name, value in second_settings.items():
        torch.testing.assert_close(value, (ahead[1][name] - behind[1][name]) / (2 * move), rtol=1e-4, atol=1e-4)


def test_radam_divides_by_no_root_that_it_does_not_trust() -> None:
    """Not even by a zero that a learnt `beta2` would keep in the graph."""
    rule = RAdam(lr=0.05, beta2=ht.Hyper("beta2"), beta1=ht.Hyper("beta1"), eps=0.0)
    extra = {"beta1": torch.tensor(0.8, dtype=F64), "beta2": torch.tensor(0.9, dtype=F64)}
    problem = replace(partly_used(rule, extra), num_steps=5)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(), step_size=1e-5)
    assert check.passed, str(check)
    assert torch.isfinite(ht.unroll(problem, problem.init_hparams()).params["w"]).all()
