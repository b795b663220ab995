"""CIFAR-FS: the 100 classes of CIFAR-100, split into classes to learn from and classes to judge on."""

from __future__ import annotations

from pathlib import Path

import torch

from hypertorch.checks.values import check_switch
from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets.cifar100_files import HOW_TO_GET, PER_CLASS, read_cifar100
from hypertorch.fewshot.datasets.cifar_fs_classes import CIFAR_FS_CLASSES
from hypertorch.fewshot.datasets.data_folder import data_folder
from hypertorch.fewshot.datasets.image_classes import ImageClasses
from hypertorch.fewshot.datasets.image_folder import split_parts


def CIFARFS(  # noqa: N802  (made like an instance, as the other data sets)
    root: str | Path | None = None,
    *,
    split: str,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> ImageClasses:
    """Returns one split of CIFAR-FS: 64, 16 or 20 classes of 600 colour images of 32 x 32 pixels.

    Read from CIFAR-100 in its official archive, in folders of classes, or in one mosaic per class (see
    `read_cifar100`); the split is by class name.

    Cost: seconds at first, then from the cache; `classes * 600 * 3072` bytes (118 MB for `meta_train`).

    Args:
        root: folder with CIFAR-100; a subfolder `cifar100` is looked into as well. By default the environment variable
            HYPERTORCH_DATA says where.
        split: `"meta_train"`, `"meta_val"`, `"meta_test"`, or several joined by `+`.
        cache_dir: folder for decoded images; by default the user's cache folder.
        progress: shows a bar while decoding.

    Raises:
        TypeError: if `root` is no path.
        ValueError: if `split` names none, or one twice.
        DatasetError: if the data is missing, incomplete or damaged.

    References:
        Bertinetto, Henriques, Torr and Vedaldi (2019), Meta-learning with differentiable closed-form solvers,
        section 4.1; Krizhevsky (2009), Learning multiple layers of features from tiny images.
    """
    check_switch("progress", progress)
    classes = [name for part in split_parts(split, CIFAR_FS_CLASSES) for name in CIFAR_FS_CLASSES[part]]
    folder = data_folder(root)
    if folder is None:
        raise DatasetError(f"`root` is not given, and HYPERTORCH_DATA is not set: CIFAR-100 is not found. {HOW_TO_GET}")
    inner = folder / "cifar100"
    images = read_cifar100(inner if inner.is_dir() else folder, classes, cache_dir=cache_dir, progress=progress)
    return ImageClasses(
        # Shares the memory of the array: there is no second copy of a hundred megabytes.
        images=torch.from_numpy(images.reshape(-1, *images.shape[2:])),
        counts=(PER_CLASS,) * len(classes),
        class_names=tuple(classes),
        source="CIFARFS",
        split=split,
    )
