"""Steps run again: what counts as the same state, and what does not."""

from __future__ import annotations

import pytest
import torch

from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.errors import ReplayError
from hypertorch.hypergradients.guards.replay import Replays, check_replay, check_values
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


def test_the_first_comparison_that_fails_is_named() -> None:
    replays = Replays()
    for start in (9, 6, 3, 0):
        # The first two fail, and by another entry each; those after them agree.
        replayed = state(1e-3) if start == 6 else state()
        if start == 3:
            replayed.params["w"] += 0.5
        replays.add(replayed, state(), start, start + 3)
    with pytest.raises(
        ReplayError, match=r"`dynamics.momentum.w` after inner step 8 differs by 0.001 .* steps 6 to 8 "
    ):
        replays.check()
    agreeing = Replays()
    agreeing.check()
    agreeing.add(state(), state(), 0, 3)
    agreeing.check()


def test_a_tolerance_is_that_of_each_segment() -> None:
    eps = torch.finfo(torch.float64).eps
    for order in ((0, 30), (30, 0)):
        replays = Replays()
        for stop in order:
            # Enough for 30 steps of rounding, and too much for none.
            replays.add(state(2000 * eps if stop else 0.0), state(), 0, stop)
        replays.check()
    replays = Replays()
    replays.add(state(), state(), 0, 30)
    replays.add(state(2000 * eps), state(), 0, 3)
    with pytest.raises(ReplayError, match="steps 0 to 2"):
        replays.check()


def test_coarser_products_of_the_inner_loss_have_a_tolerance_of_their_own() -> None:
    for replays, passes in ((Replays(inner_eps=0.0078125), True), (Replays(), False)):
        replays.add(state(1e-3), state(), 0, 1)
        if passes:
            replays.check()
        else:
            with pytest.raises(ReplayError):
                replays.check()


def test_no_state_and_no_graph_is_kept() -> None:
    replays = Replays()
    bytes_kept = []
    with PeakMemory() as memory:
        for start in range(4):
            replayed = InnerState({"w": torch.ones(1000, requires_grad=True) * 1.0}, {})
            replays.add(replayed, InnerState({"w": torch.ones(1000)}, {}), start, start + 1)
            del replayed
            bytes_kept.append(memory.current)
    assert bytes_kept[0] < 50 and len(set(bytes_kept[1:])) == 1
