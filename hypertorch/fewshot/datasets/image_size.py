"""The size that images are scaled to: at least a pixel, and no more than memory holds."""

from __future__ import annotations

import os

from hypertorch.fewshot._checks import check_count


def check_image_size(
    image_size: int, *, images: int = 1, channels: int = 1, minimum: int = 1, why: str = "images need pixels"
) -> None:
    """Raises unless so many images of this size can be kept, of a byte for each entry.

    Args:
        image_size: height and width (unit: pixels).
        images: how many there are.
        channels: of each.
        minimum: the smallest size allowed.
        why: what is wrong with a smaller one.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is too small, or the images do not fit into memory.
    """
    check_count("image_size", image_size, minimum=minimum, why=why, advice="use for instance `image_size=28`")
    needed, memory = images * channels * image_size**2, _memory()
    # Said before the first is decoded: a system that promises more memory than it has ends the process later.
    if memory is not None and needed > memory:
        raise ValueError(
            f"`image_size` is {image_size}, with which {images} images take {needed // 2**30} GiB: this machine has "
            f"{memory // 2**30} GiB of memory. Use a smaller size, such as `image_size=84`."
        )


def _memory() -> int | None:
    """Returns the memory of the machine (unit: bytes); None where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
