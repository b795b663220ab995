"""Items sorted by class: the form in which a sampler of episodes takes every data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from hypertorch.checks.argument_types import check_fields

ClassesT = TypeVar("ClassesT", bound="Classes")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Classes(ABC):
    """Abstract: items of several classes in one tensor, so that a batch of episodes is one gather.

    Args:
        counts: items of each class, at least 1 each, in the order of the tensor.
        class_names: one distinct name per class.
        source: name of the data set, shown by `repr`; by default that of the class.
        split: which part of the data set this is, shown by `repr`; None for no part or an unnamed one.

    Raises:
        ValueError: if the counts do not fit the tensor, a class is empty, or two classes share a name.
    """

    field: ClassVar[str]
    """Name of the field that holds the tensor, which is that of its items in the plural."""

    counts: tuple[int, ...]
    class_names: tuple[str, ...]
    source: str = ""
    split: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "counts", "class_names", "source", "split")
        # Lists from a config file become tuples, so that nothing can change the checked value.
        object.__setattr__(self, "counts", tuple(self.counts))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "source", self.source or type(self).__name__)
        if isinstance(self.tensor, Tensor) and self.tensor.layout is not torch.strided:
            raise TypeError(
                f"`{self.field}` is a tensor of {self.tensor.layout} layout: a batch of episodes is gathered from its "
                "rows. Convert it with `.to_dense()`."
            )
        self._check_items()
        self._check_classes()
        # Contiguous images can be viewed as a matrix; others would be copied as a whole for each batch.
        object.__setattr__(self, self.field, self.tensor.contiguous())

    def __repr__(self) -> str:
        # Sizes instead of entries and hundreds of names.
        split = "" if self.split is None else f"split={self.split!r}, "
        sizes = f"classes={self.num_classes}, {self.field}={len(self.tensor)}, item_shape={self.item_shape}"
        return f"{self.source}({split}{sizes})"

    @property
    def tensor(self) -> Tensor:
        """All items of class 0, then all of class 1, and so on, shape `(num_items, *item_shape)`."""
        return getattr(self, self.field)

    @property
    def noun(self) -> str:
        """What one item is called in messages."""
        return self.field.removesuffix("s")

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.counts)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one item."""
        return tuple(self.tensor.shape[1:])

    @cached_property
    def counts_array(self) -> np.ndarray:
        """`counts` as an int64 array."""
        return np.array(self.counts, dtype=np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each class, an int64 array."""
        return np.cumsum(self.counts_array) - self.counts_array

    def to(self: ClassesT, device: torch.device | str) -> ClassesT:
        """Returns the same classes with their items on `device`; episodes are then made there."""
        return replace(self, **{self.field: self.tensor.to(device)})

    @abstractmethod
    def inputs(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns items as the inputs of a learner, shape `(rows, *item_shape)`.

        Args:
            rows: which items, int64 `(rows,)`, on the device of the items.
            dtype: floating-point type of the inputs.
        """

    @abstractmethod
    def _check_items(self) -> None:
        """Raises if the tensor is not of the type and shape that the class stores."""

    def _check_classes(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise ValueError(
                f"`counts` is {_shortened(self.counts)}: every class needs an {self.noun} to be drawn. Leave "
                "empty classes out."
            )
        if sum(self.counts) != len(self.tensor):
            raise ValueError(
                f"`counts` sums to {sum(self.counts)}, but `{self.field}` has {len(self.tensor)} rows: each "
                f"{self.noun} belongs to one class. Sort `{self.field}` by class and count the rows of each."
            )
        if len(self.class_names) != len(self.counts):
            raise ValueError(
                f"`class_names` has {len(self.class_names)} entries, but `counts` has {len(self.counts)}: each class "
                "has one name. Give both in the same order."
            )
        if len(set(self.class_names)) != len(self.class_names):
            seen: set[str] = set()
            twice = next(name for name in self.class_names if name in seen or seen.add(name))
            raise ValueError(
                f"`class_names` holds {twice!r} twice: the two would be told apart by label although they are one "
                "class. Merge them, or give them different names."
            )


def _shortened(counts: tuple[int, ...]) -> str:
    return str(counts) if len(counts) <= 8 else f"({', '.join(map(str, counts[:8]))}, ...)"
