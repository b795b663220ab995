"""Steps that are run again must arrive where they arrived the first time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.errors import ReplayError
from hypertorch.inner.state import InnerState

_TOLERANCE = 100.0  # in units of the dtype's machine epsilon, relative to the largest entry of the whole state

_ADVICE = (
    "the derivative would belong to another run. Let `InnerProblem.batch` and `loss` depend on their arguments only "
    "(no iterator, no counter, no generator of your own)."
)


def check_replay(replayed: InnerState, expected: InnerState, start: int, stop: int, *, inner_eps: float = 0.0) -> None:
    """Raises `ReplayError` if steps run again arrived elsewhere, so that their derivative would be of another run.

    Some kernels differ in the last bit with and without a graph, hence a tolerance. What an inner loss of coarser
    products differs by enters the state after it was made smaller twice: by the step size, and beside the params.

    Args:
        replayed: the state after the steps were run again.
        expected: the state after they were run first.
        start: the first of the steps.
        stop: one past the last.
        inner_eps: machine epsilon of the inner loss's products where they are coarser than the state.
    """
    with torch.no_grad():
        check_gaps(replay_gaps(replayed, expected, inner_eps=inner_eps), expected, start, stop)


def replay_gaps(replayed: InnerState, expected: InnerState, *, inner_eps: float = 0.0) -> Tensor:
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
    allowed = [_TOLERANCE * max(torch.finfo(first.dtype).eps, inner_eps**2) * size for _, first in pairs]
    return torch.stack([torch.stack([_size(again - first) for again, first in pairs]), torch.stack(allowed)], dim=1)


def check_gaps(gaps: Tensor, expected: InnerState, start: int, stop: int) -> None:
    """Raises `ReplayError` if a gap is larger than rounding over that number of steps can make it.

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
    # Rounding adds up over the steps of a segment.
    too_far = gaps[:, 0] > max(stop - start, 1) * gaps[:, 1]
    if bool(too_far.any()):
        name, gap = names[int(too_far.nonzero()[0])], float(gaps[too_far][0, 0])
        raise ReplayError(
            f"`{name}` after inner step {stop - 1} differs by {gap:.3g} from the first run when steps "
            f"{start} to {stop - 1} are run again: {_ADVICE}"
        )


def _size(value: Tensor) -> Tensor:
    # One dtype, to be stacked: the entries of a state may differ.
    return value.abs().max().to(torch.float32)


def check_values(first: Mapping[int, Tensor], again: Mapping[int, Tensor], *, inner_eps: float = 0.0) -> None:
    """Raises `ReplayError` if the inner loss of a step differs from its first run.

    Args:
        first: the loss by the step, shape `()` or `(tasks,)`.
        again: the same of steps that were run again.
        inner_eps: machine epsilon of the inner loss's products where they are coarser than its value.
    """
    steps = sorted(again.keys() & first.keys())
    if not steps:
        return
    with torch.no_grad():
        expected = torch.stack([first[step] for step in steps])
        gaps = (torch.stack([again[step] for step in steps]) - expected).abs().reshape(len(steps), -1).amax(dim=1)
        eps = max(torch.finfo(expected.dtype).eps, inner_eps**2)
        allowed = _TOLERANCE * eps * torch.stack(list(first.values())).abs().max()
        # One wait for the device, for all steps together.
        too_far = (gaps > allowed).tolist()
    for step, gap, is_too_far in zip(steps, gaps, too_far, strict=True):
        if is_too_far:
            raise ReplayError(
                f"the inner loss before step {step} differs by {float(gap):.3g} from the first run when the step is "
                f"run again: {_ADVICE}"
            )
