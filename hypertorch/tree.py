"""Algebra on flat dictionaries of tensors, and slicing of nested batches along the tasks axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypertorch.types import Batch, TensorDict, TensorMapping


def detach(tree: TensorMapping) -> TensorDict:
    """Returns the same values, cut from any graph."""
    return {name: value.detach() for name, value in tree.items()}


def leaves_requiring_grad(tree: TensorMapping) -> TensorDict:
    """Returns detached tensors that a derivative can be taken in; integer and boolean entries stay as they are."""
    # Detached first: a leaf of its own, behind which no derivative goes on.
    return {
        name: value.detach().requires_grad_() if value.is_floating_point() or value.is_complex() else value
        for name, value in tree.items()
    }


def is_differentiable(value: Tensor) -> bool:
    """Returns whether a derivative in this tensor makes sense: it holds floating-point or complex numbers."""
    return value.is_floating_point() or value.is_complex()


def zeros_like(tree: TensorMapping) -> TensorDict:
    """Returns zeros of the same names, shapes, dtypes and devices."""
    return {name: torch.zeros_like(value) for name, value in tree.items()}


def add(left: TensorMapping, right: TensorMapping, alpha: float | Tensor = 1.0) -> TensorDict:
    """Returns `left + alpha * right`, entry by entry; both must have the same names.

    Args:
        left: the first.
        right: the second.
        alpha: a number; or a tensor of shape `(tasks,)`, one for each task, where entries have a leading tasks axis.
    """
    # A number is a factor of the sum itself: one operation, and one node in the graph of every inner step.
    if isinstance(alpha, Tensor):
        return {name: value + _beside(alpha, value) * right[name] for name, value in left.items()}
    return {name: torch.add(value, right[name], alpha=alpha) for name, value in left.items()}


def scale(tree: TensorMapping, factor: Tensor) -> TensorDict:
    """Returns `factor * tree`, entry by entry; a factor of shape `(tasks,)` where entries have a leading tasks axis."""
    return {name: _beside(factor, value) * value for name, value in tree.items()}


def dot(left: TensorMapping, right: TensorMapping, *, tasks_axis: bool = False) -> Tensor:
    """Returns the inner product over all entries in the widest dtype of the entries, a scalar.

    Args:
        left: one vector.
        right: the other.
        tasks_axis: whether entries have a leading tasks axis; the result is then one number per task, `(tasks,)`.
    """
    # Not one flat vector: that would copy every param.
    products = [value * right[name] for name, value in left.items()]
    terms = [product.reshape(len(product), -1).sum(1) if tasks_axis else product.sum() for product in products]
    return torch.stack(terms).sum(0) if terms else torch.zeros(())


def norm(tree: TensorMapping, *, tasks_axis: bool = False) -> Tensor:
    """Returns the Euclidean norm over all entries, a scalar; with a tasks axis one for each task, `(tasks,)`."""
    return dot(tree, tree, tasks_axis=tasks_axis).sqrt()


def _beside(factor: Tensor, value: Tensor) -> Tensor:
    """Returns one number, or one per task, shaped and typed to multiply an entry."""
    # One factor per task is a tensor with an axis, which would make an entry of lower precision wider.
    return factor.to(value.dtype).reshape(factor.shape + (1,) * (value.dim() - factor.dim()))


def with_prefix(prefix: str, tree: TensorMapping) -> TensorDict:
    """Returns the entries renamed to `prefix.name`."""
    return {f"{prefix}.{name}": value for name, value in tree.items()}


def without_prefix(prefix: str, tree: TensorMapping) -> TensorDict:
    """Returns the entries called `prefix.name`, under `name`."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in tree.items() if name.startswith(start)}


def add_optional(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Returns the sum of two derivatives, where None means that there is no path (and not a zero)."""
    if left is None or right is None:
        return right if left is None else left
    return left + right


def accumulate(total: Mapping[str, Tensor | None], part: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Returns the sum of two derivatives in the same variables; None where neither has a path."""
    summed: dict[str, Tensor | None] = {}
    for name, left in total.items():
        right = part[name]
        summed[name] = right if left is None else left if right is None else left + right
    return summed


class PairwiseSum:
    """A sum of derivatives, taken in pairs, then in pairs of pairs, and so on; None for no path.

    Halves, quarters and so on of `2**k` terms can so be summed apart, and give the same bits when they are summed in
    turn: several processes round like one.

    Cost: the additions of any sum; memory for as many derivatives as the number of terms has binary digits.
    """

    def __init__(self) -> None:
        # Sums of 2**k terms each, of falling k, as the binary digits of the number of terms.
        self._sums: list[tuple[int, dict[str, Tensor | None]]] = []

    def add(self, term: dict[str, Tensor | None]) -> None:
        """Adds a term, of the same names as the others."""
        count = 1
        while self._sums and self._sums[-1][0] == count:
            earlier = self._sums.pop()[1]
            term = accumulate(earlier, term)
            count *= 2
        self._sums.append((count, term))

    def total(self) -> dict[str, Tensor | None]:
        """Returns the sum of all terms, of which there is at least one."""
        total = self._sums[-1][1]
        for _, earlier in reversed(self._sums[:-1]):
            total = accumulate(earlier, total)
        return total


def map_batch(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Returns the batch with `function` applied to every tensor in its nested tuples, lists and dicts."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def flatten_batch(batch: Batch) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Returns every tensor of a nested batch, in a fixed order, and what puts others in their places."""
    leaves, structure = pytree.tree_flatten(batch)
    # What is no tensor (a name, a count) stays in its place.
    positions = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        filled = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            filled[position] = tensor
        return pytree.tree_unflatten(filled, structure)

    return [leaves[position] for position in positions], rebuild


def batch_tensors(batch: Batch) -> list[Tensor]:
    """Returns every tensor of a nested batch, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def concatenate(trees: Sequence[TensorMapping]) -> TensorDict:
    """Returns the entries of all trees joined along their first axis."""
    return {name: torch.cat([tree[name] for tree in trees]) for name in trees[0]}


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; a copy from the host is not waited for where the device reads pinned memory."""
    accelerator = torch.accelerator.current_accelerator()
    # Apple's GPU shares the host's memory, and pins none of it.
    if value.device.type != "cpu" or accelerator is None or device.type != accelerator.type or device.type == "mps":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def not_zero(tensors: TensorMapping) -> set[str]:
    """Returns the names of the tensors that hold another number than zero.

    Cost: one reduction per tensor and a single copy to the host.
    """
    # Stacked, so that the device is waited for once and not once per tensor.
    found = torch.stack([tensor.detach().count_nonzero() for tensor in tensors.values()]).tolist() if tensors else []
    return {name for name, holds in zip(tensors, found, strict=True) if holds}


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether no tensor holds NaN or infinity.

    Cost: one reduction per tensor and a single copy to the host.
    """
    # A sum is NaN or infinite when an entry is; a finite overflow of the sum itself is settled by a second look.
    looked_at: list[Tensor] = []
    sums: list[Tensor] = []
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor = tensor.detach()
                looked_at.append(tensor)
                # A magnitude has both parts of a complex number.
                total = tensor.abs().sum() if tensor.is_complex() else tensor.sum()
                sums.append(total.to(looked_at[0].device, torch.float32))
        # One number for all, and one wait for the device, in place of a wait for each.
        if not sums or math.isfinite(torch.stack(sums).sum().item()):
            return True
        return all(bool(torch.isfinite(tensor).all()) for tensor in looked_at)
