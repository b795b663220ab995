"""Images of handwritten digits: scikit-learn's, which are embedded, or MNIST's, from a folder."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from experiments.common.commands.failures import ExpectedFailure

DigitsName: TypeAlias = Literal["digits", "mnist"]
"""scikit-learn's 1,797 scans of 8 x 8 pixels, or MNIST's 70,000 of 28 x 28."""

CLASSES = 10
_DARKEST = {"digits": 16.0, "mnist": 255.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Images with labels.

    Args:
        inputs: pixels from 0 (paper) to 1 (ink), shape `(images, pixels)`.
        labels: the digits, shape `(images,)`.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Images:
        """Returns some of the images."""
        return Images(inputs=self.inputs[index], labels=self.labels[index])

    @property
    def side(self) -> int:
        """Rows, and columns, of an image (unit: pixels)."""
        return round(self.inputs.shape[1] ** 0.5)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Returns inputs and labels."""
        return self.inputs, self.labels


def digit_splits(
    name: DigitsName,
    sizes: Mapping[str, int],
    *,
    root: str | Path | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Images]:
    """Returns disjoint sets of images, drawn at random.

    Args:
        name: which images.
        sizes: of each set, by its name; for one of them, 0 stands for all that the others leave over.
        root: the folder with MNIST's four `.gz` files; only for "mnist".
        seed: of the draw.
        device: where the tensors are.
        dtype: of the inputs.

    Raises:
        ExpectedFailure: if there are not as many images, or the files are missing.
    """
    pixels, digits = _load(name, root)
    remedy = "Ask for fewer, or write experiment.data=mnist experiment.root=FOLDER."
    drawn = random_splits(pixels, digits, sizes, source=f"`experiment.data={name}`", seed=seed, remedy=remedy)
    return {
        split: Images(inputs=(images.inputs.to(dtype) / _DARKEST[name]).to(device), labels=images.labels.to(device))
        for split, images in drawn.items()
    }


def random_splits(
    inputs: Tensor,
    labels: Tensor,
    sizes: Mapping[str, int],
    *,
    source: str,
    seed: int = 0,
    remedy: str = "Ask for fewer.",
) -> dict[str, Images]:
    """Returns disjoint sets, drawn at random, of images that were read already.

    Args:
        inputs: of all images, shape `(images, entries)`.
        labels: of all images, shape `(images,)`.
        sizes: of each set, by its name; for one of them, 0 stands for all that the others leave over.
        source: what says which images these are, for the message.
        seed: of the draw.
        remedy: what to do if there are too few, the last sentence of the message.

    Raises:
        ExpectedFailure: if there are not as many images.
    """
    left = len(labels) - sum(sizes.values())
    open_ended = [split for split, size in sizes.items() if size == 0]
    if len(open_ended) > 1 or min(sizes.values()) < 0:
        raise ExpectedFailure(
            f"the experiment asks for {_listed(sizes)} images: a size is at least 0, and 0 stands for all that the "
            "others leave over, which one set alone can have. Give the others a size."
        )
    if left < len(open_ended):
        rest = ", and the rest" if open_ended else ""
        raise ExpectedFailure(
            f"the experiment asks for {sum(sizes.values())} images ({_listed(sizes)}{rest}), but "
            f"{source} has {len(labels)}. {remedy}"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    ends = accumulate((size or left for size in sizes.values()), initial=0)
    return {
        split: Images(inputs=inputs[order[start:end]], labels=labels[order[start:end]])
        for split, (start, end) in zip(sizes, pairwise(ends), strict=True)
    }


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size} {name}" for name, size in sizes.items())


def _load(name: DigitsName, root: str | Path | None) -> tuple[Tensor, Tensor]:
    """Returns pixels as they are stored, shape `(images, pixels)`, and digits."""
    if name == "digits":
        if root is not None:
            raise ExpectedFailure(
                f"`experiment.root` is {str(root)!r}, but `experiment.data=digits` are scikit-learn's scans: they need "
                "no folder. Leave it out, or write experiment.data=mnist."
            )
        pixels, digits = load_digits(return_X_y=True)
        return torch.as_tensor(pixels), torch.as_tensor(digits).long()
    if name != "mnist":
        raise ExpectedFailure(f"`experiment.data` is {name!r}, which names no images. Use digits or mnist.")
    if root is None:
        raise ExpectedFailure(
            "`experiment.root` is null, but `experiment.data=mnist` reads MNIST's four files from a folder. Write "
            "experiment.root=FOLDER, with train-images-idx3-ubyte.gz and the other three in it."
        )
    parts = [
        (_read_idx(root, f"{part}-images-idx3-ubyte.gz"), _read_idx(root, f"{part}-labels-idx1-ubyte.gz"))
        for part in ("train", "t10k")
    ]
    pixels = np.concatenate([images.reshape(len(images), -1) for images, _ in parts])
    digits = np.concatenate([labels for _, labels in parts])
    if len(pixels) != len(digits):
        raise ExpectedFailure(
            f"`experiment.root` is {str(root)!r}, whose files have {len(pixels)} images and {len(digits)} labels: they "
            "do not belong together. Download MNIST's four files again."
        )
    return torch.as_tensor(pixels), torch.as_tensor(digits).long()


def _read_idx(root: str | Path, name: str) -> np.ndarray:
    """Returns the unsigned bytes of an IDX file: two zeros, 8 for bytes, the number of axes, their lengths."""
    path = Path(root) / name
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ExpectedFailure(
            f"`experiment.root` is {str(root)!r}, but {name} cannot be read there ({error}). Name the folder with "
            "MNIST's four .gz files."
        ) from error
    axes = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", count=axes, offset=4) if len(content) >= 4 + 4 * axes else np.zeros(0)
    if not axes or len(content) != 4 + 4 * axes + int(np.prod(shape)):
        raise ExpectedFailure(f"{path} is no IDX file of bytes, which MNIST's are. Download it again.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(*shape.astype(int))
