"""Random changes of training images, and their normalisation: batches at once, a pure function of a generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import is_count


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop, mirror and colour for images of training episodes; each image is changed on its own.

    Cost: one gather and a few operations for a whole batch of images.

    Args:
        crop_padding: images are padded by so many zeros on each side and cropped to their size at a random place (unit:
            pixels); 0 for none. It has to be below their height and width, so that something of them stays.
        flip: mirror left and right with probability one half.
        brightness: images are multiplied by a factor drawn from `1 -/+ brightness`, in [0, 1).
        contrast: the distance of an image from its mean grey is multiplied by a factor from `1 -/+ contrast`, in
            [0, 1).

    Raises:
        TypeError: if `flip` is no bool, or `brightness` or `contrast` is no number.
        ValueError: if a number is out of range.
    """

    crop_padding: int = 0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0

    def __post_init__(self) -> None:
        if not is_count(self.crop_padding, least=0):
            raise ValueError(
                f"`crop_padding` is {self.crop_padding!r}: images are moved by whole pixels. Pass 0 or more; 4 is "
                "usual for 32 x 32 pixels."
            )
        # Not by truth: any text from a config file is true in Python, "False" as well.
        if not isinstance(self.flip, bool):
            raise TypeError(
                f"`flip` is {self.flip!r}, a {type(self.flip).__name__}: images are mirrored with probability one half "
                "or not at all. Pass True or False."
            )
        for name in ("brightness", "contrast"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                raise TypeError(
                    f"`{name}` is {value!r}, a {type(value).__name__}: it is the largest relative change of an image. "
                    "Pass a number in [0, 1)."
                )
            # Written as what is allowed, so that NaN is refused.
            if not 0.0 <= value < 1.0:
                raise ValueError(
                    f"`{name}` is {value}: factors are drawn from 1 - {name} to 1 + {name}, and must stay positive. "
                    "Use a number in [0, 1)."
                )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Returns changed copies.

        Args:
            images: floats in [0, 1] of shape `(batch, channels, height, width)`.
            generator: on the images' device; its state is all that the result depends on besides the images.

        Raises:
            ValueError: if `crop_padding` is at least the height or width of the images.
        """
        # The order of the draws is part of what a seed means: another order changes the images of every run.
        images = self._moved(images, generator)
        for name, centre in (("brightness", None), ("contrast", "mean")):
            strength = getattr(self, name)
            if strength:
                factor = 1.0 + strength * (2.0 * _uniform(images, generator) - 1.0)
                # One mean and one factor for all channels: a factor for each would change the hue.
                middle = images.mean(dim=(1, 2, 3), keepdim=True) if centre else 0.0
                # Cut off, as mean and deviation of a `Normalisation` are those of pixels in [0, 1].
                images = ((images - middle) * factor + middle).clamp(0.0, 1.0)
        return images

    def _moved(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crops and mirrors by one gather of pixels."""
        if not self.crop_padding and not self.flip:
            return images
        batch, _, height, width = images.shape
        pad, device = self.crop_padding, images.device
        if pad >= min(height, width):
            raise ValueError(
                f"`crop_padding` is {pad}, but the images have {height} x {width} pixels: a crop could hold nothing of "
                f"its image. Use at most {min(height, width) - 1}; an eighth of the size is usual."
            )
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device).expand(batch, -1)
        if self.flip:
            # Mirrored by the index: the one gather below then serves mirrored images and others alike.
            mirrored = torch.rand(batch, 1, generator=generator, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        shift = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator, device=device)
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        index = torch.arange(batch, device=device)[:, None, None]
        # With a slice between the index tensors PyTorch puts the indexed axes first: (batch, height, width, channels).
        moved = padded[index, :, (rows + shift[0])[:, :, None], (columns + shift[1])[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Subtracts a mean from every channel and divides by a standard deviation.

    Args:
        mean: one number per channel, or one for all.
        std: as many numbers, above 0.

    Raises:
        ValueError: if the lengths differ, a number is not finite, or a deviation is not above 0; and, from a call, if
            the images have another number of channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        check_fields(self, "mean", "std")
        # Lists from a config file become tuples, so that nothing can change the checked value.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        # Checked before the comparison with 0, which NaN passes.
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != len(self.std) or not self.mean or not finite or min(self.std) <= 0.0:
            raise ValueError(
                f"`mean` and `std` are {self.mean} and {self.std}: each channel has one of both, and is divided by the "
                "second. Give as many finite numbers of either, the second above 0."
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Returns normalised images of shape `(batch, channels, height, width)`."""
        if len(self.mean) not in (1, images.shape[1]):
            raise ValueError(
                f"`images` have {images.shape[1]} channels, but `mean` has {len(self.mean)} entries. Give one number "
                "per channel, or one for all."
            )
        # Of the type and on the device of the images: a plain tensor is float32 on the host, and would make
        # half-precision images single.
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device, dtype=images.dtype)
