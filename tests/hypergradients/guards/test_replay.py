"""Steps run again: what counts as the same state, and what does not."""

from __future__ import annotations

import pytest
import torch

from hypertorch.errors import ReplayError
from hypertorch.hypergradients.guards.replay import check_replay
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
