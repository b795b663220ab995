"""The check itself is checked: it passes what is right and fails what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import hypertorch as ht
from hypertorch.hypergradients import BackendResult, Hypergradient
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge

F64 = torch.float64


@dataclass(frozen=True)
class SlightlyWrong(Hypergradient):
    """Reverse mode, off by a millionth and a bit in one hyperparameter."""

    relative_error: float

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        result = ht.hypergradients.Reverse().compute(loop, variables)
        lam = result.grads["lam"]
        assert lam is not None
        grads = {**result.grads, "lam": lam * (1 + self.relative_error)}
        return BackendResult(grads=grads, outer_loss=result.outer_loss, state=result.state)


def test_passes_reverse_and_prints_a_verdict() -> None:
    problem = Ridge().problem(10)
    check = ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse())
    assert check and check.passed and check.max_error < 1e-9
    assert "passed: largest relative error" in str(check)
    assert "ok  lam" in str(check)


def test_fails_a_hypergradient_that_is_off_by_two_millionths() -> None:
    problem = Ridge().problem(10)
    check = ht.check_hypergradient(problem, problem.init_hparams(), SlightlyWrong(2e-6))
    assert not check and not check.passed
    assert "BAD lam" in str(check) and "ok  eta" in str(check)
    assert "FAILED" in str(check)
    # Not for the differences' own fault.
    assert all(one.spread < 1e-9 for one in check.checks)
    assert "(differences agree to" in str(check).splitlines()[0]


@pytest.mark.parametrize("relative_error", [0.0, 1e-4])
def test_a_strongly_curved_loss_is_told_from_a_wrong_hypergradient(relative_error: float) -> None:
    """Beside so long a step it is."""
    problem = Ridge().problem(10)
    check = ht.check_hypergradient(problem, problem.init_hparams(), SlightlyWrong(relative_error), step_size=0.1)
    assert check.passed is (relative_error == 0.0)
    assert any(one.spread > 0.0 for one in check.checks)
    assert max(one.spread for one in check.checks) < 1e-6


def test_a_loss_that_is_not_smooth_leaves_it_open() -> None:
    inner = LambdaInner(lambda _: {"w": torch.zeros(1, dtype=F64)}, lambda p, h, _: (p["w"] - h["c"]).square().sum())
    # A kink where the hyperparameter is.
    outer = LambdaOuter({"c": torch.zeros(1, dtype=F64)}, lambda p, h, _: (h["c"] + 1e-9).relu().sqrt().sum())
    problem = ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=1)
    check = ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse())
    assert not check.passed
    assert check.checks[0].spread > 1e-3


def test_needs_double_precision() -> None:
    problem = Ridge().problem(10)
    hparams = {name: value.float() for name, value in problem.init_hparams().items()}
    with pytest.raises(TypeError, match=r"`hparams\['lam'\]` has dtype torch.float32.*torch.float64"):
        ht.check_hypergradient(problem, hparams, ht.hypergradients.Reverse())


def test_leaves_hparams_alone() -> None:
    problem = Ridge().problem(4)
    hparams = problem.init_hparams()
    before = {name: value.clone() for name, value in hparams.items()}
    ht.check_hypergradient(problem, hparams, ht.hypergradients.Reverse())
    assert all(torch.equal(hparams[name], before[name]) for name in before)
