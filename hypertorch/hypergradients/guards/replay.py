"""Steps that are run again must arrive where they arrived the first time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

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


class Replays:
    """Steps that were run again, compared with where they arrived first; the answer is read once, at the end.

    A comparison stays on the device: to look at each of them would be a wait in every segment. The first that fails is
    kept, as two numbers for each entry of the state; no state is, and no graph.

    Some kernels differ in the last bit with and without a graph, hence a tolerance. What an inner loss of coarser
    products differs by enters the state after it was made smaller twice: by the step size, and beside the params.

    Args:
        inner_eps: machine epsilon of the inner loss's products where they are coarser than the state.
    """

    def __init__(self, *, inner_eps: float = 0.0) -> None:
        self._inner_eps = inner_eps
        self._steps: list[range] = []
        self._first: _Comparison | None = None

    def add(self, replayed: InnerState, expected: InnerState, start: int, stop: int) -> None:
        """Compares where some steps arrived; entries that hold no real or complex numbers do not count.

        Args:
            replayed: the state after the steps were run again.
            expected: the state after they were run first.
            start: the first of the steps.
            stop: one past the last.
        """
        pairs = [
            (again, first)
            for again, first in zip(replayed.tensors(), expected.tensors(), strict=True)
            if tree.is_differentiable(first) and first.numel()
        ]
        if not pairs:
            return
        with torch.no_grad():
            # Of the whole state: entries that are zero but for rounding have no size of their own to compare with.
            size = torch.stack([_size(first) for _, first in pairs]).max()
            # Rounding adds up over the steps of a segment.
            factor = _TOLERANCE * max(stop - start, 1)
            gaps = torch.stack([_size(again - first) for again, first in pairs])
            allowed = torch.stack(
                [factor * max(torch.finfo(first.dtype).eps, self._inner_eps**2) * size for _, first in pairs]
            )
            too_far = gaps > allowed
            failed = too_far.any()
            if self._first is None:
                names = [
                    name
                    for name, value in zip(expected.names(), expected.tensors(), strict=True)
                    if tree.is_differentiable(value) and value.numel()
                ]
                self._first = _Comparison(names, gaps, too_far, failed, torch.zeros_like(failed, dtype=torch.int64))
            else:
                # Chosen on the device, which knows whether one has failed already.
                known = self._first
                self._first = _Comparison(
                    known.names,
                    torch.where(known.failed, known.gaps, gaps),
                    torch.where(known.failed, known.too_far, too_far),
                    known.failed | failed,
                    torch.where(known.failed, known.position, len(self._steps)),
                )
        self._steps.append(range(start, stop))

    def check(self) -> None:
        """Raises `ReplayError` if a gap is larger than rounding can make it; it names the first that was compared.

        Cost: one wait for the device, whatever the number of comparisons.
        """
        if self._first is None or not bool(self._first.failed):
            return
        steps, entry = self._steps[int(self._first.position)], int(self._first.too_far.nonzero()[0])
        raise ReplayError(
            f"`{self._first.names[entry]}` after inner step {steps.stop - 1} differs by "
            f"{float(self._first.gaps[entry]):.3g} from the first run when steps {steps.start} to {steps.stop - 1} are "
            f"run again: {_ADVICE}"
        )


class _Comparison(NamedTuple):
    """A comparison: the first that failed, else the newest.

    Attributes:
        names: of the entries.
        gaps: how far apart each is, shape `(entries,)`.
        too_far: whether that is more than rounding.
        failed: whether one of them is, a scalar.
        position: which comparison it is, a scalar.
    """

    names: list[str]
    gaps: Tensor
    too_far: Tensor
    failed: Tensor
    position: Tensor


def check_replay(replayed: InnerState, expected: InnerState, start: int, stop: int, *, inner_eps: float = 0.0) -> None:
    """Raises `ReplayError` if steps run again arrived elsewhere, so that their derivative would be of another run.

    One comparison, and one wait for the device: for several, gather them in `Replays`.

    Args:
        replayed: the state after the steps were run again.
        expected: the state after they were run first.
        start: the first of the steps.
        stop: one past the last.
        inner_eps: machine epsilon of the inner loss's products where they are coarser than the state.
    """
    replays = Replays(inner_eps=inner_eps)
    replays.add(replayed, expected, start, stop)
    replays.check()


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
