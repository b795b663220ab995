"""Minibatches of a map-style data set as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import TensorDataset, default_collate

from hypertorch import tree
from hypertorch.autodiff.noise import random_permutation
from hypertorch.checks.values import check_seed, is_count
from hypertorch.types import Batch


class MapDataset(Protocol):
    """A data set with a length and items by index, such as `torch.utils.data.TensorDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Minibatches:
    """Minibatches in epochs of a new random order each; `minibatches(step)` is a pure function of `step`.

    Because the batch of a step depends on its index alone, a step that is run again sees the same data, which is what
    makes replaying backends exact. The last batch of an epoch is dropped if it would be smaller.

    Cost: one gather per step for a `TensorDataset`; otherwise one item at a time, collated as torch's loader does.

    Args:
        dataset: any map-style data set.
        batch_size: items in a batch, at most the size of the data set.
        seed: of the order; equal seeds give equal batches on every platform.

    Raises:
        ValueError: if `batch_size` is below 1 or above the size of the data set.
        TypeError: if the data set has no length.
    """

    dataset: MapDataset
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        # A tensor without axes has a length only by name.
        if not isinstance(self.dataset, Sized) or getattr(self.dataset, "ndim", 1) == 0:
            raise TypeError(
                f"`dataset` is a {type(self.dataset).__name__} without a length: a batch that depends on the step "
                "alone needs items by index. Use a map-style data set, not an iterable one."
            )
        if not is_count(self.batch_size) or self.batch_size > len(self.dataset):
            raise ValueError(
                f"`batch_size` is {self.batch_size!r}, but the data set has {len(self.dataset)} items: a batch holds "
                "between 1 and all of them. Choose a whole number in that range."
            )
        check_seed(self.seed)

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return len(self.dataset) // self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """Returns the indices of the items in a step's batch, shape `(batch,)`."""
        epoch, position = divmod(step, self.num_batches)
        order = _epoch_order(len(self.dataset), self.seed, epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step."""
        chosen = self.indices(step)
        if isinstance(self.dataset, TensorDataset):
            # The indices go to the data, which may lie on an accelerator.
            tensors, indices = self.dataset.tensors, torch.from_numpy(chosen)
            there = {device: tree.to_device(indices, device) for device in {tensor.device for tensor in tensors}}
            return tuple(tensor[there[tensor.device]] for tensor in tensors)
        # Plain integers: not every data set takes those of numpy.
        return default_collate([self.dataset[int(index)] for index in chosen])


# Every step of an epoch takes its part of one order; a few are kept for runs whose steps are run again.
@lru_cache(maxsize=8)
def _epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    return random_permutation(length, seed, epoch)
