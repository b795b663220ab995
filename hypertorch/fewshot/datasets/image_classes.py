"""Images sorted by class: the form in which every few-shot image data set comes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageClasses:
    """Images of several classes, kept as bytes in one tensor so that a batch of episodes is one gather.

    Args:
        images: uint8 `(num_images, channels, height, width)`, all images of class 0, then all of class 1, and so on.
        counts: images of each class, at least 1 each, in the order of `images`.
        class_names: one distinct name per class.
        source: name of the data set, shown by `repr`.
        split: which part of the data set this is, shown by `repr`; None for no part or an unnamed one.

    Raises:
        TypeError: if `images` is no uint8 tensor.
        ValueError: if the shapes do not fit together, a class is empty, or two classes share a name.
    """

    images: Tensor
    counts: tuple[int, ...]
    class_names: tuple[str, ...]
    source: str = "ImageClasses"
    split: str | None = None

    def __post_init__(self) -> None:
        # Lists from a config file become tuples, so that nothing can change the checked value.
        object.__setattr__(self, "counts", tuple(self.counts))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        self._check_images()
        self._check_classes()
        object.__setattr__(self, "images", self.images.contiguous())

    def __repr__(self) -> str:
        # Sizes instead of pixels and hundreds of names.
        split = "" if self.split is None else f"split={self.split!r}, "
        sizes = f"classes={self.num_classes}, images={len(self.images)}, item_shape={self.item_shape}"
        return f"{self.source}({split}{sizes})"

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.counts)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one image, `(channels, height, width)`."""
        return tuple(self.images.shape[1:])

    @cached_property
    def counts_array(self) -> np.ndarray:
        """`counts` as an int64 array."""
        return np.array(self.counts, dtype=np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each class in `images`, an int64 array."""
        return np.cumsum(self.counts_array) - self.counts_array

    def to(self, device: torch.device | str) -> ImageClasses:
        """Returns the same classes with their images on `device`; episodes are then made there."""
        return replace(self, images=self.images.to(device))

    def _check_images(self) -> None:
        if not isinstance(self.images, Tensor) or self.images.dtype != torch.uint8:
            got = self.images.dtype if isinstance(self.images, Tensor) else type(self.images).__name__
            raise TypeError(
                f"`images` is {got}: images are stored as bytes and scaled to [0, 1] per episode. Pass a uint8 tensor, "
                "for instance `(255 * images).round().to(torch.uint8)`."
            )
        if self.images.dim() != 4:
            raise ValueError(
                f"`images` has shape {tuple(self.images.shape)}: four axes (num_images, channels, height, width) are "
                "needed. Add the channel axis with `images.unsqueeze(1)`."
            )

    def _check_classes(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise ValueError(
                f"`counts` is {_shortened(self.counts)}: every class needs an image to be drawn. Leave empty classes "
                "out."
            )
        if sum(self.counts) != len(self.images):
            raise ValueError(
                f"`counts` sums to {sum(self.counts)}, but `images` has {len(self.images)} rows: each image belongs to "
                "one class. Sort `images` by class and count the rows of each."
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
