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
        # Of the whole state: entries that are zero but for rounding have no size of their own to compare with.
        sizes = [_size(value) for value in expected.tensors() if tree.is_differentiable(value) and value.numel()]
        size = torch.stack(sizes).max() if sizes else torch.zeros(())
        for name, again, first in zip(expected.names(), replayed.tensors(), expected.tensors(), strict=True):
            if not tree.is_differentiable(first) or not first.numel():
                continue
            gap = (again - first).abs().max()
            if bool(gap > _TOLERANCE * max(stop - start, 1) * torch.finfo(first.dtype).eps * size):
                raise ReplayError(
                    f"`{name}` after inner step {stop - 1} differs by {float(gap):.3g} from the first run when steps "
                    f"{start} to {stop - 1} are run again: the derivative would belong to another run. Let "
                    "`InnerProblem.batch` and `loss` depend on their arguments only (no iterator, no counter, no "
                    "generator of your own), or use `Reverse()`, which runs every step once."
                )


def _size(value: Tensor) -> Tensor:
    return value.abs().max().to(torch.float32)
