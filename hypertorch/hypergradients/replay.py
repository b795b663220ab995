"""Steps that are run again must arrive where they arrived the first time."""

from __future__ import annotations

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.errors import ReplayError
from hypertorch.inner_loop import InnerState

_TOLERANCE = 100.0  # in units of the dtype's machine epsilon, relative to the largest entry of the whole state


def check_replay(replayed: InnerState, expected: InnerState, start: int, stop: int) -> None:
    """Raises `ReplayError` if steps run again arrived elsewhere, so that their derivative would be of another run.

    Some kernels differ in the last bit with and without a graph, hence a tolerance.

    Args:
        replayed: the state after the steps were run again.
        expected: the state after they were run first.
        start: the first of the steps.
        stop: one past the last.
    """
    with torch.no_grad():
        check_gaps(replay_gaps(replayed, expected), expected, start, stop)


def replay_gaps(replayed: InnerState, expected: InnerState) -> Tensor:
    """Returns how far apart two states are, and how far one step may bring them, shape `(entries, 2)`.

    Only the entries that hold real or complex numbers count, in the order of `InnerState.tensors`.
    """
    pairs = [
        (again, first)
        for again, first in zip(replayed.tensors(), expected.tensors(), strict=True)
        if tree.is_differentiable(first) and first.numel()
    ]
    if not pairs:
        return torch.zeros(0, 2)
    # Of the whole state: entries that are zero but for rounding have no size of their own to compare with.
    size = torch.stack([_size(first) for _, first in pairs]).max()
    allowed = [_TOLERANCE * torch.finfo(first.dtype).eps * size for _, first in pairs]
    return torch.stack([torch.stack([_size(again - first) for again, first in pairs]), torch.stack(allowed)], dim=1)


def check_gaps(gaps: Tensor, expected: InnerState, start: int, stop: int) -> None:
    """Raises `ReplayError` if a gap is larger than so many steps may make it.

    Args:
        gaps: as `replay_gaps` returns them.
        expected: a state of the run, for the names.
        start: the first of the steps that were run again.
        stop: one past the last.
    """
    names = [
        name
        for name, value in zip(expected.names(), expected.tensors(), strict=True)
        if tree.is_differentiable(value) and value.numel()
    ]
    too_far = gaps[:, 0] > max(stop - start, 1) * gaps[:, 1]
    if bool(too_far.any()):
        name, gap = names[int(too_far.nonzero()[0])], float(gaps[too_far][0, 0])
        raise ReplayError(
            f"`{name}` after inner step {stop - 1} differs by {gap:.3g} from the first run when steps "
            f"{start} to {stop - 1} are run again: the derivative would belong to another run. Let "
            "`InnerProblem.batch` and `loss` depend on their arguments only (no iterator, no counter, no "
            "generator of your own), or use `Reverse()`, which runs every step once."
        )


def _size(value: Tensor) -> Tensor:
    return value.abs().max().to(torch.float32)
