"""Images sorted by class: the form in which every few-shot image data set comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch.fewshot.datasets.classes import Classes


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageClasses(Classes):
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

    field: ClassVar[str] = "images"

    images: Tensor

    def inputs(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns images scaled to [0, 1], shape `(rows, channels, height, width)`.

        Args:
            rows: which images, int64 `(rows,)`, on their device.
            dtype: floating-point type of the inputs.
        """
        images = self.images.flatten(1)  # a view; gathering rows of a matrix is the fastest form
        # Chosen before they become floats, which take four times the memory. Dividing in place leaves the bytes alone:
        # from bytes to floats `to` always makes a new tensor.
        return images.index_select(0, rows).to(dtype).div_(255).view(-1, *self.item_shape)

    def _check_items(self) -> None:
        if not isinstance(self.images, Tensor) or self.images.dtype != torch.uint8:
            got = self.images.dtype if isinstance(self.images, Tensor) else type(self.images).__name__
            raise TypeError(
                f"`images` is {got}: images are stored as bytes and scaled to [0, 1] per episode. Pass a uint8 tensor, "
                "for instance `(255 * images).round().to(torch.uint8)`; for data that are no images, use "
                "`TensorClasses`."
            )
        if self.images.dim() != 4:
            raise ValueError(
                f"`images` has shape {tuple(self.images.shape)}: four axes (num_images, channels, height, width) are "
                "needed. Add the channel axis with `images.unsqueeze(1)`."
            )
