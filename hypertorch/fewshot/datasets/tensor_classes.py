"""Vectors, series, token ids, or other tensors of one shape, sorted by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch.fewshot.datasets.classes import Classes


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TensorClasses(Classes):
    """Items of several classes that are no images: features, series or token ids.

    Episodes hold floating-point items in the type that the sampler names, and integers as they are.

    Example:
        `EpisodeSampler(TensorClasses.of({"cat": cat_features, "dog": dog_features}), way=2, ...)`

    Args:
        items: floating point, int64 or int32, `(num_items, *item_shape)`, all items of class 0, then all of class 1,
            and so on; an item has one axis at least.
        counts: items of each class, at least 1 each, in the order of `items`.
        class_names: one distinct name per class.
        source: name of the data set, shown by `repr`.
        split: which part of the data set this is, shown by `repr`; None for no part or an unnamed one.

    Raises:
        TypeError: if `items` is no tensor of such a type.
        ValueError: if the shapes do not fit together, a class is empty, or two classes share a name.
    """

    field: ClassVar[str] = "items"

    items: Tensor

    @classmethod
    def of(cls, per_class: Mapping[str, Tensor], *, source: str = "", split: str | None = None) -> TensorClasses:
        """Returns the classes of a dictionary from their names to their items.

        Args:
            per_class: the items of each class, `(items of the class, *item_shape)`, of one shape and type.
            source: name of the data set, shown by `repr`.
            split: which part of it this is.

        Raises:
            TypeError: if it is no dictionary of tensors.
            ValueError: if there is no class, or the items of two classes differ in shape, type or device.
        """
        if not isinstance(per_class, Mapping) or not all(isinstance(items, Tensor) for items in per_class.values()):
            raise TypeError(
                f"`per_class` is a {type(per_class).__name__} that is no dictionary of tensors: each class has a name "
                "and its items. Pass `{name: tensor of shape (items, ...), ...}`."
            )
        if not per_class:
            raise ValueError("`per_class` is empty: episodes are drawn from classes. Give at least two.")
        # Compared before they are joined: `torch.cat` would convert types silently.
        kinds = {name: (tuple(items.shape[1:]), items.dtype, items.device) for name, items in per_class.items()}
        first = next(iter(kinds))
        for name, kind in kinds.items():
            if kind != kinds[first]:
                raise ValueError(
                    f"`per_class[{name!r}]` has items of {_shown(*kind)}, but `per_class[{first!r}]` has "
                    f"{_shown(*kinds[first])}: all lie in one tensor. Pad or convert them to one shape and type."
                )
        return cls(
            items=torch.cat(list(per_class.values())),
            counts=tuple(len(items) for items in per_class.values()),
            class_names=tuple(per_class),
            source=source,
            split=split,
        )

    def inputs(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns items, shape `(rows, *item_shape)`.

        Args:
            rows: which items, int64 `(rows,)`, on their device.
            dtype: type of floating-point items; integers stay.
        """
        chosen = self.items.index_select(0, rows)
        # Token ids are looked up, not computed with: as floats no embedding would take them.
        return chosen.to(dtype) if chosen.is_floating_point() else chosen

    def _check_items(self) -> None:
        is_tensor = isinstance(self.items, Tensor)
        if not is_tensor or not (self.items.is_floating_point() or self.items.dtype in (torch.int64, torch.int32)):
            got = self.items.dtype if is_tensor else f"a {type(self.items).__name__}"
            raise TypeError(
                f"`items` is {got}: networks compute with floating-point numbers, or look up int64 or int32 tokens. "
                "Convert it, `items.float()` or `items.long()`; images stored as bytes are `ImageClasses`."
            )
        if self.items.is_floating_point() and not self.items.is_meta and not bool(self.items.isfinite().all()):
            raise ValueError(
                "`items` holds NaN or infinity: every loss of an episode with such an item would be none. Replace what "
                "is missing, or leave those items out."
            )
        # A learner's inputs have an axis of tasks, one of examples, and what is left for one item.
        if self.items.dim() < 2:
            raise ValueError(
                f"`items` has shape {tuple(self.items.shape)}: the first axis counts items, and each has an axis of "
                "its own at least. Add it with `items.unsqueeze(1)`."
            )


def _shown(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"shape {shape} and {dtype} on {device}"
