"""Entries of a dictionary held side by side, so that elementwise arithmetic is one operation for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from hypertorch.types import TensorDict, TensorMapping


class JointEntries:
    """Which entries are held in one tensor, and the conversion between the two forms.

    Args:
        blocks: names of entries, by the name of the block that holds them; a block of one entry is that entry.
        like: the entries, for their shapes.
        batch_dims: leading axes that all entries have and blocks keep: 1 with a tasks axis, else 0.
    """

    def __init__(self, blocks: Mapping[str, Sequence[str]], like: TensorMapping, batch_dims: int) -> None:
        self._blocks = blocks
        self._names = list(like)
        self._shapes = {name: value.shape for name, value in like.items()}
        self._sizes = {name: shape[batch_dims:].numel() for name, shape in self._shapes.items()}
        self._batch_dims = batch_dims

    def join(self, values: TensorMapping) -> TensorDict:
        """Returns the blocks of some entries, in new memory where a block has several."""
        return {
            block: values[names[0]]
            if len(names) == 1
            else torch.cat([self._flat(values[name]) for name in names], dim=self._batch_dims)
            for block, names in self._blocks.items()
        }

    def split(self, blocks: TensorMapping) -> TensorDict:
        """Returns the entries of blocks, as views, in the order of the entries that this was made of."""
        found: TensorDict = {}
        for block, names in self._blocks.items():
            if len(names) == 1:
                found[names[0]] = blocks[block]
                continue
            sizes = [self._sizes[name] for name in names]
            for name, part in zip(names, blocks[block].split(sizes, dim=self._batch_dims), strict=True):
                found[name] = part.reshape(self._shapes[name])
        # Blocks have another order, and integers are compared with those of the start place by place.
        return {name: found[name] for name in self._names}

    def with_prefix(self, prefix: str) -> JointEntries:
        """Returns the same for entries and blocks called `prefix.name`."""
        named = JointEntries({}, {}, self._batch_dims)
        named._blocks = {
            f"{prefix}.{block}": [f"{prefix}.{name}" for name in names] for block, names in self._blocks.items()
        }
        named._names = [f"{prefix}.{name}" for name in self._names]
        named._shapes = {f"{prefix}.{name}": shape for name, shape in self._shapes.items()}
        named._sizes = {f"{prefix}.{name}": size for name, size in self._sizes.items()}
        return named

    def _flat(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape[: self._batch_dims], -1)


def blocks_of(keys: Mapping[str, Hashable]) -> dict[str, list[str]]:
    """Returns the names that have equal keys, by the first of them; a name whose key is None is alone."""
    blocks: dict[str, list[str]] = {}
    first: dict[Hashable, str] = {}
    for name, key in keys.items():
        block = name if key is None else first.setdefault(key, name)
        blocks.setdefault(block, []).append(name)
    return blocks
