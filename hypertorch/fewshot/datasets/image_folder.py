"""Any folder whose subfolders are classes of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hypertorch.errors import DatasetError
from hypertorch.fewshot._checks import check_integer
from hypertorch.fewshot.datasets.image_classes import ImageClasses
from hypertorch.fewshot.datasets.image_files import SUFFIXES, is_image, read_images


def ImageFolder(  # noqa: N802  (made like an instance, as the other data sets)
    root: str | Path,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    image_size: int = 84,
    channels: int = 3,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> ImageClasses:
    """Returns the classes of `root/<split>/<class>/<image>`, or of `root/<class>/<image>` without a split.

    A split is a folder of that name, `meta_train` or `train`, `meta_val` or `val`, `meta_test` or `test`; several are
    joined by `+`. Classes and images come in alphabetical order. Images are cropped to a centred square and scaled.

    Cost: about 1 ms per photograph at first, then from the cache; `num_images * channels * image_size**2` bytes.

    Args:
        root: the folder.
        split: which part; None if the classes lie in `root` itself.
        classes: names of the classes to take, in this order; None for all.
        image_size: height and width (unit: pixels).
        channels: 1 for grey, 3 for colour.
        cache_dir: folder for decoded images; by default the user's cache folder.
        progress: shows a bar while decoding.

    Raises:
        ValueError: if `split` names none, or a size is out of range.
        DatasetError: if folders or classes are missing, a class is empty, or a file is damaged.
    """
    check_integer("image_size", image_size, minimum=1, why="images need pixels", advice="use for instance 84")
    folder = Path(root).expanduser()
    found: dict[str, list[Path]] = {}
    for part in _split_folders(folder, split):
        for name, files in _classes_in(part).items():
            found.setdefault(name, []).extend(files)
    chosen = found if classes is None else _chosen(found, classes, folder)
    return read_classes(
        f"{folder.name}-{split or 'all'}",
        chosen,
        image_size=image_size,
        channels=channels,
        cache_dir=cache_dir,
        progress=progress,
    )


def read_classes(
    name: str,
    files: Mapping[str, Sequence[Path]],
    *,
    image_size: int,
    channels: int,
    cache_dir: str | Path | None,
    progress: bool,
) -> ImageClasses:
    """Returns the images of the given files, by class.

    Args:
        name: first part of the cache file's name.
        files: the files of every class, in the order wanted.
        image_size: height and width (unit: pixels).
        channels: 1 for grey, 3 for colour.
        cache_dir: folder for decoded images; by default the user's cache folder.
        progress: shows a bar while decoding.
    """
    images = read_images(
        name,
        [file for members in files.values() for file in members],
        image_size=image_size,
        channels=channels,
        cache_dir=cache_dir,
        progress=progress,
    )
    counts = tuple(len(members) for members in files.values())
    return ImageClasses(images=torch.from_numpy(images), counts=counts, class_names=tuple(files))


_FOLDERS = {
    "meta_train": ("meta_train", "train"),
    "meta_val": ("meta_val", "val", "validation"),
    "meta_test": ("meta_test", "test"),
}


def _split_folders(root: Path, split: str | None) -> list[Path]:
    if not root.is_dir():
        raise DatasetError(
            f"`root` is {str(root)!r}, which is no folder: images are read from its subfolders. Pass the folder that "
            "holds them."
        )
    if split is None:
        return [root]
    folders = []
    for part in split.split("+"):
        if part not in _FOLDERS:
            raise ValueError(
                f"`split` is {split!r}, which names no split. Use {', '.join(map(repr, _FOLDERS))}, or several joined "
                "by '+'; None if the classes lie in `root` itself."
            )
        existing = [root / name for name in _FOLDERS[part] if (root / name).is_dir()]
        if not existing:
            raise DatasetError(
                f"`root` is {str(root)!r}, which has no folder {' or '.join(map(repr, _FOLDERS[part]))} for the split "
                f"{part!r}. Sort the class folders into one folder per split, or pass `split=None`."
            )
        folders.append(existing[0])
    return folders


def _classes_in(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(file for file in path.iterdir() if is_image(file))
        if not files:
            raise DatasetError(
                f"`root` has the class folder {str(path)!r} without an image ({', '.join(SUFFIXES)}): a class without "
                "images cannot be drawn. Remove the folder, or point `root` at the folder that holds the classes."
            )
        found[path.name] = files
    if not found:
        raise DatasetError(
            f"`root` has {str(folder)!r} without a subfolder: each class is a folder of images. Sort the images into "
            "one folder per class."
        )
    return found


def _chosen(found: Mapping[str, list[Path]], classes: Sequence[str], root: Path) -> dict[str, list[Path]]:
    missing = [name for name in classes if name not in found]
    if missing:
        raise DatasetError(
            f"`root` is {str(root)!r}, which lacks the classes {missing[:5]} ({len(missing)} of {len(classes)} "
            "wanted): the copy is incomplete, or of another data set. Compare the names of its folders."
        )
    return {name: found[name] for name in classes}
