"""Steps run again: what counts as the same state, and what does not."""

from __future__ import annotations

import pytest
import torch

from hypertorch.errors import ReplayError
from hypertorch.hypergradients.guards.replay import check_replay, check_values
from hypertorch.inner.state import InnerState


def state(shift: float = 0.0, *, dtype: torch.dtype = torch.float64) -> InnerState:
    """A state with large, tiny, empty and integer entries, one of them shifted."""
    return InnerState(
        {"w": torch.tensor([0.0, -3.0], dtype=dtype), "empty": torch.zeros(0, dtype=dtype), "count": torch.tensor(4)},
        {"momentum.w": torch.tensor([1e-17 + shift, 0.0], dtype=dtype)},
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_is_allowed_relative_to_the_whole_state(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    check_replay(state(dtype=dtype), state(dtype=dtype), 0, 3)
    check_replay(state(10 * eps, dtype=dtype), state(dtype=dtype), 0, 3)
    with pytest.raises(ReplayError, match=r"`dynamics.momentum.w` after inner step 2 .* steps 0 to 2 are run again"):
        check_replay(state(2000 * eps, dtype=dtype), state(dtype=dtype), 0, 3)
    check_replay(state(2000 * eps, dtype=dtype), state(dtype=dtype), 0, 30)


def test_a_state_without_numbers_is_the_same() -> None:
    nothing = InnerState({"count": torch.tensor(4), "empty": torch.zeros(0)}, {})
    check_replay(nothing, nothing, 0, 0)


def test_zeros_that_come_again_are_the_same() -> None:
    zeros = InnerState({"w": torch.zeros(3)}, {"momentum.w": torch.zeros(3)})
    check_replay(zeros, zeros, 0, 2)
    check_values({0: torch.zeros(()), 1: torch.zeros(())}, {1: torch.zeros(())})


@pytest.mark.parametrize("shape", [(), (3,)])
def test_losses_are_compared_by_their_steps(shape: tuple[int, ...]) -> None:
    first = {step: torch.full(shape, 1.0 + step, dtype=torch.float64) for step in range(4)}
    check_values(first, {2: first[2] * (1.0 + 1e-15), 5: torch.zeros(shape)})
    check_values(first, {})
    with pytest.raises(ReplayError, match=r"the inner loss before step 2 differs by 0.1 "):
        check_values(first, {1: first[1], 2: first[2] + 0.1})
    check_values(first, {2: first[2] + 1e-4}, inner_eps=0.0078125)
