"""The data of the steps of a loop that is inside a program: what all steps share once, what differs stacked."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import Batch

# What cannot change between two steps but by being exchanged.
_CONSTANTS = (NoneType, bool, int, float, complex, str, bytes, slice, range, Enum, type, torch.dtype, torch.device)


class Data(NamedTuple):
    """The data of some steps.

    Attributes:
        first: the data of the first step, whole.
        stacked: the tensors that differ between steps, with a leading axis of steps, by their position in the batch.
    """

    first: Batch
    stacked: dict[int, Tensor]

    def at(self, own: Iterable[Tensor]) -> Batch:
        """Returns the data of a step, of which `own` are the tensors that differ, in the order of `stacked`."""
        if not self.stacked:
            return self.first
        leaves, structure = pytree.tree_flatten(self.first)
        for position, value in zip(self.stacked, own, strict=True):
            leaves[position] = value
        return pytree.tree_unflatten(leaves, structure)


def data_of(loop: InnerLoop, steps: range) -> Data:
    """Returns the data of some steps.

    A tensor that every step hands over is held once. The others are copied as soon as they are drawn: whoever draws
    them may write the next ones to the same place.

    Raises:
        NotCompilableError: if its structure, its shapes or what is no tensor in it differ between steps, or could.
    """
    first = loop.draw(loop.first_index + steps.start)
    leaves, structure = pytree.tree_flatten(first)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_CONSTANTS)):
            raise NotCompilableError(
                f"the data of the steps holds a `{type(leaf).__name__}`, of which nobody knows whether it is the same "
                "at every step. Hand over tensors, in tuples, lists and dictionaries"
            )
    marks = [_mark(leaf) for leaf in leaves]
    # A tensor, and a tuple of some, changes by being written to alone.
    parts = first if isinstance(first, tuple) else (first,)
    is_fixed = len(parts) == len(leaves) and all(part is leaf for part, leaf in zip(parts, leaves, strict=True))
    differing: set[int] = set()
    # The second step tells which tensors differ. Should a later one show more of them, all are drawn once more.
    looked_at = steps[1:2]
    while True:
        stacked = {position: _room(leaves[position], len(steps)) for position in sorted(differing)}
        found = set(differing)
        for step in looked_at:
            batch = loop.draw(loop.first_index + step)
            if batch is first and is_fixed and not differing:
                found |= {position for position, leaf in enumerate(leaves) if _mark(leaf) != marks[position]}
                continue
            own, other = pytree.tree_flatten(batch)
            if other != structure:
                raise NotCompilableError("the data of the steps has not one structure")
            for position, (leaf, value) in enumerate(zip(leaves, own, strict=True)):
                if position in stacked:
                    _copy(value, stacked[position][step - steps.start])
                elif not isinstance(leaf, Tensor):
                    if value != leaf:
                        raise NotCompilableError("the data of the steps holds other values than tensors, which differ")
                elif value is not leaf or _mark(value) != marks[position]:
                    found.add(position)
        if found != differing:
            differing, looked_at = found, steps
        elif looked_at.stop < steps.stop:
            looked_at = steps[2:]
        else:
            return Data(first, {position: of_any_length(value) for position, value in stacked.items()})


def _mark(leaf: Any) -> int:
    """Returns what grows when a tensor is written to."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def _room(leaf: Tensor, num_steps: int) -> Tensor:
    return torch.empty((num_steps, *leaf.shape), dtype=leaf.dtype, device=leaf.device)


def _copy(value: Any, place: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != place.shape or value.dtype != place.dtype:
        raise NotCompilableError("the data of the steps has not one shape")
    place.copy_(value.detach())


def counters_of(loop: InnerLoop, steps: range) -> Tensor:
    """Returns the indices of some steps, int64."""
    first = loop.first_index
    indices = torch.arange(first + steps.start, first + steps.stop, device=loop.device)
    return of_any_length(indices)


def of_any_length(value: Tensor) -> Tensor:
    """Returns the tensor, marked: programs take any length of its first axis."""
    torch._dynamo.maybe_mark_dynamic(value, 0)
    return value
