"""What a run asks of PyTorch, counted by hand."""

from __future__ import annotations

import torch

from benchmarks.operations import counted


def test_calls_and_the_bytes_that_they_move() -> None:
    left, right = torch.ones(3, 4, dtype=torch.float32), torch.ones(4, 5, dtype=torch.float32)
    product = {"operations": 1, "moved_bytes": 4 * (12 + 20 + 15)}
    assert counted(lambda: left @ right) == product
    # A view moves nothing.
    assert counted(lambda: left @ right.t().t()) == {**product, "operations": 3}
    assert counted(lambda: torch.stack([left, left])) == {"operations": 1, "moved_bytes": 4 * (12 + 12 + 24)}
    assert counted(lambda: left.clone().add_(1.0))["moved_bytes"] == 4 * (2 * 12 + 2 * 12)
    assert counted(lambda: None) == {"operations": 0, "moved_bytes": 0}


def test_the_way_back_and_vectorised_calls_count() -> None:
    value = torch.ones(6, dtype=torch.float64, requires_grad=True)
    forward = counted(lambda: value.detach().exp().sum())
    assert forward == {"operations": 3, "moved_bytes": 8 * (6 + 6 + 6 + 1)}
    both = counted(lambda: torch.autograd.grad(value.exp().sum(), value))
    assert both["operations"] >= 3 + 2
    assert both["moved_bytes"] >= forward["moved_bytes"] + 8 * 3 * 6
    vectorised = counted(lambda: torch.func.vmap(torch.exp)(value.detach().reshape(2, 3)))
    assert vectorised["moved_bytes"] == 8 * 12
