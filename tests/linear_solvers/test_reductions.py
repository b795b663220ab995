"""Algebra per task, on which solvers rest: rows of a batch are vectors of their own."""

from __future__ import annotations

import torch

from hypertorch import tree
from tests.helpers.problems import normal

A = {"number": normal(3, seed=0), "matrix": normal(3, 2, 4, seed=1), "empty": normal(3, 0, seed=2)}
B = {"number": normal(3, seed=3), "matrix": normal(3, 2, 4, seed=4), "empty": normal(3, 0, seed=5)}


def row(entries: dict[str, torch.Tensor], task: int) -> dict[str, torch.Tensor]:
    return {name: value[task] for name, value in entries.items()}


def test_reductions_per_task_are_those_of_each_row() -> None:
    dots, norms = tree.dot(A, B, tasks_axis=True), tree.norm(A, tasks_axis=True)
    assert dots.shape == norms.shape == (3,)
    for task in range(3):
        torch.testing.assert_close(dots[task], tree.dot(row(A, task), row(B, task)))
        torch.testing.assert_close(norms[task], tree.norm(row(A, task)))
    torch.testing.assert_close(dots.sum(), tree.dot(A, B))


def test_a_factor_per_task_scales_each_row() -> None:
    factors = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    sums = tree.add(A, B, alpha=factors)
    for task in range(3):
        expected = tree.add(row(A, task), row(B, task), alpha=float(factors[task]))
        for name, value in expected.items():
            torch.testing.assert_close(sums[name][task], value)
    assert torch.equal(sums["matrix"][1], A["matrix"][1])


def test_a_factor_that_is_a_tensor_scales_everything_and_keeps_dtypes() -> None:
    left = {"half": torch.ones(2), "whole": torch.ones(2, dtype=torch.float64)}
    sums = tree.add(left, left, alpha=torch.tensor(0.5, dtype=torch.float64))
    assert {name: value.dtype for name, value in sums.items()} == {"half": torch.float32, "whole": torch.float64}
    assert torch.equal(sums["half"], torch.full((2,), 1.5))
    assert tree.dot(left, left).dtype == torch.float64
