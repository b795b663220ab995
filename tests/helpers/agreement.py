"""That two backends return the same."""

from __future__ import annotations

from typing import Any

import torch

import hypertorch as ht
from hypertorch.types import TensorDict


def assert_equal(
    problem: ht.BilevelProblem,
    backend: ht.Hypergradient,
    expected: ht.HypergradientResult,
    hparams: TensorDict,
    **options: Any,
) -> None:
    """Asserts loss, hypergradient and final state in float64, up to the order in which numbers are added."""
    result = ht.hypergradient(problem, hparams, backend=backend, **options)
    torch.testing.assert_close(result.outer_loss, expected.outer_loss, rtol=1e-12, atol=1e-14)
    for name in hparams:
        torch.testing.assert_close(result.grads[name], expected.grads[name], rtol=1e-10, atol=1e-13)
    for name in expected.params:
        torch.testing.assert_close(result.params[name], expected.params[name], rtol=1e-11, atol=1e-14)


def assert_equals_reverse(problem: ht.BilevelProblem, backend: ht.Hypergradient, **options: Any) -> None:
    """Asserts that the backend returns what `Reverse` does."""
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse(), **options)
    assert_equal(problem, backend, expected, hparams, **options)
