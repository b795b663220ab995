"""What is particular to SGD: its first step, and the rule of Maclaurin et al. as a case of it."""

from __future__ import annotations

import pytest
import torch

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.helpers.problems import normal

SGD = ht.dynamics.SGD
GRADS = {"w": normal(3, seed=1)}
PARAMS = {"w": normal(3, seed=2)}
STATE = {"momentum.w": normal(3, seed=3)}


def buffer_after(rule: ht.dynamics.SGD, index: int) -> torch.Tensor:
    return rule.update(GRADS, PARAMS, STATE, {}, index)[1]["momentum.w"]


@pytest.mark.parametrize(
    ("settings", "index", "kept", "entering"),
    [
        ({}, 0, 0.9, 1.0),
        ({}, 3, 0.9, 1.0),
        ({"nesterov": True}, 0, 0.9, 1.0),
        ({"dampen_first": True}, 0, 0.9, 1.0),
        ({"dampening": 0.3}, 0, 0.0, 1.0),
        ({"dampening": 0.3}, 3, 0.9, 0.7),
        ({"dampening": 0.3, "dampen_first": True}, 0, 0.9, 0.7),
        ({"dampening": 0.3, "dampen_first": True}, 3, 0.9, 0.7),
    ],
)
def test_what_the_buffer_keeps_and_takes_in(settings: dict, index: int, kept: float, entering: float) -> None:
    buffer = buffer_after(SGD(lr=0.1, momentum=0.9, **settings), index)
    torch.testing.assert_close(buffer, kept * STATE["momentum.w"] + entering * GRADS["w"], rtol=1e-14, atol=1e-15)


def test_momentum_and_dampening_alike_are_the_rule_of_maclaurin() -> None:
    """v = beta v - (1 - beta) g, w = w + alpha v, with the sign of v turned round."""
    alphas, betas = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    rule = SGD(lr=alphas, momentum=betas, dampening=betas, dampen_first=True)
    w, v = PARAMS["w"], torch.zeros(3, dtype=torch.float64)
    params: TensorDict = dict(PARAMS)
    state = rule.init(params, {})
    for index, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
        v = beta * v - (1 - beta) * w**3
        w = w + alpha * v
        params, state = rule.update({"w": params["w"] ** 3}, params, state, {}, index)
        torch.testing.assert_close(params["w"], w, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(state["momentum.w"], -v, rtol=1e-13, atol=1e-15)


def test_without_momentum_there_is_no_state() -> None:
    assert SGD(lr=0.1).init(PARAMS, {}) == {}
    assert SGD(lr=0.1, momentum={"w": 0.0}).init(PARAMS, {}) == {}
    assert set(SGD(lr=0.1, momentum={"w": 0.9}).init(PARAMS, {})) == {"momentum.w"}
