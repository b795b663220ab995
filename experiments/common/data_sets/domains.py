"""Domains of small grey images for few-shot learning: sets of classes that do not look like each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets.digits import CLASSES, DigitsName, digit_splits
from hypertorch.errors import DatasetError
from hypertorch.fewshot import CIFARFS, ImageClasses, Omniglot, StrokeCharacters

Domain: TypeAlias = dict[str, ImageClasses]
"""Classes of `(1, 28, 28)` images by part: to learn from, to validate on and to test on."""

PARTS = ("meta_train", "meta_val", "meta_test")
SIDE = 28


def load_domain(name: str, root: str | None) -> Domain:
    """Returns a domain, whose parts have no image in common, and no class but where all are digits.

    "strokes" are made-up characters; "inverted", "blurred" and "bold" are others, changed as they say. "digits" are
    scikit-learn's scans. These are embedded. "omniglot", "mnist" and "cifar100", in grey, are read from a folder.

    Args:
        name: which domain.
        root: folder that has the folders `omniglot`, `mnist` and `cifar100`; only for these.

    Raises:
        ExpectedFailure: if there is no such domain, or its folder is missing.
    """
    if name not in _EMBEDDED | _IN_FOLDERS:
        raise ExpectedFailure(
            f"`experiment.domains` has {name!r}, which names no images. Use some of: "
            f"{', '.join(_EMBEDDED | _IN_FOLDERS)}."
        )
    if name in _EMBEDDED:
        return _EMBEDDED[name]()
    if root is None:
        raise ExpectedFailure(
            f"`experiment.root` is null, but the domain {name!r} is read from a folder. Write experiment.root=FOLDER, "
            "with the folders omniglot, mnist and cifar100 in it."
        )
    try:
        return _IN_FOLDERS[name](Path(root))
    except DatasetError as error:
        raise ExpectedFailure(f"`experiment.root` is {root!r}, but {name} cannot be read there. {error}") from error


def _strokes(seed: int, change: Callable[[Tensor], Tensor]) -> Domain:
    """Returns characters of a world of their own, with pixels from 0 (paper) to 1 (ink) changed."""
    sizes = {"meta_train": 100, "meta_val": 20, "meta_test": 40}
    drawn = {part: StrokeCharacters(split=part, num_classes=size, seed=seed) for part, size in sizes.items()}
    return {part: _changed(classes, change) for part, classes in drawn.items()}


def _digits(name: DigitsName, root: Path | None, sizes: Mapping[str, int]) -> Domain:
    found = digit_splits(name, sizes, root=None if root is None else root / "mnist")
    parts: Domain = {}
    for part, images in found.items():
        order = images.labels.argsort(stable=True)
        square = images.inputs[order].reshape(-1, 1, images.side, images.side)
        scaled = F.interpolate(square, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        parts[part] = ImageClasses(
            images=_bytes(scaled),
            counts=tuple(images.labels.bincount(minlength=CLASSES).tolist()),
            class_names=tuple(f"{part}/{digit}" for digit in range(CLASSES)),
            source=name,
            split=part,
        )
    return parts


def _omniglot(root: Path) -> Domain:
    return {part: Omniglot(root, split=part, rotations=False, image_size=SIDE) for part in PARTS}


def _grey_cifar(root: Path) -> Domain:
    def grey(images: Tensor) -> Tensor:
        # The luma of ITU-R BT.601; two pixels less on each side.
        return (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)[
            ..., 2:-2, 2:-2
        ]

    return {part: _changed(CIFARFS(root, split=part), grey) for part in PARTS}


def _changed(classes: ImageClasses, change: Callable[[Tensor], Tensor]) -> ImageClasses:
    parts = classes.images.split(2000)  # as floats, all of them would take four times the memory
    return replace(classes, images=torch.cat([_bytes(change(part.float() / 255.0)) for part in parts]))


def _bytes(images: Tensor) -> Tensor:
    return (255.0 * images).round().clamp(0, 255).to(torch.uint8)


_EMBEDDED: dict[str, Callable[[], Domain]] = {
    "strokes": lambda: _strokes(0, lambda images: images),
    "inverted": lambda: _strokes(1, lambda images: 1.0 - images),
    "blurred": lambda: _strokes(2, lambda images: F.avg_pool2d(images, 5, stride=1, padding=2)),
    "bold": lambda: _strokes(3, lambda images: F.max_pool2d(images, 3, stride=1, padding=1)),
    "digits": lambda: _digits("digits", None, {"meta_train": 900, "meta_val": 400, "meta_test": 0}),
}
_IN_FOLDERS: dict[str, Callable[[Path], Domain]] = {
    "omniglot": _omniglot,
    "mnist": lambda root: _digits("mnist", root, {"meta_train": 50000, "meta_val": 10000, "meta_test": 10000}),
    "cifar100": _grey_cifar,
}
