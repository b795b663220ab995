"""The check itself is checked: it passes what is right and fails what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import hypertorch as ht
from hypertorch.hypergradients import BackendResult, Hypergradient
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict
from tests.helpers.problems import Ridge


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
