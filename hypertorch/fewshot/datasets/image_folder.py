"""Any folder whose subfolders are classes of images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from hypertorch.checks.values import check_switch
from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets.data_folder import data_folder
from hypertorch.fewshot.datasets.image_classes import ImageClasses
from hypertorch.fewshot.datasets.image_files import is_companion, is_image, read_images
from hypertorch.fewshot.datasets.image_size import check_image_size

# The first name that is there counts.
SPLIT_FOLDERS = {
    "meta_train": ("meta_train", "train"),
    "meta_val": ("meta_val", "val", "validation"),
    "meta_test": ("meta_test", "test"),
}


def ImageFolder(  # noqa: N802  (made like an instance, as the other data sets)
    root: str | Path,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    # 84 is the size of mini-ImageNet in the literature.
    image_size: int = 84,
    channels: int = 3,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> ImageClasses:
    """Returns the classes of `root/<split>/<class>/<image>`, or of `root/<class>/<image>` without a split.

    A split is a folder of that name, `meta_train` or `train`, `meta_val` or `val`, `meta_test` or `test`; several are
    joined by `+`. Splits are of classes, so no class may be in two of them. Classes and images come in alphabetical
    order.

    Images that are not square are cropped to the centred square of their shorter side, not squeezed, and then scaled.
    What is transparent shows white; photographs are turned as their camera was held. Files are images by their suffix:
    all formats that Pillow reads (PNG, JPEG, TIFF, GIF, BMP, WebP, PGM and more; of several frames, the first). Notes,
    tables and annotations beside them (.txt, .csv, .json, .xml, ...) and hidden files are passed over; a warning names
    whatever else is left out of a class folder.

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
        TypeError: if `root` is no path.
        ValueError: if `split` names none or one twice, `classes` is no list of different names, or a size is out of
            range.
        DatasetError: if folders or classes are missing, a class is empty or in two splits, or a file is damaged.
    """
    check_switch("progress", progress)
    check_image_size(image_size)
    folder = _checked_root(root)
    found: dict[str, list[Path]] = {}
    for part in _parts(folder, split):
        # No class overwrites another: that splits share none was checked when the parts were found.
        found |= _classes_in(part)
    chosen = found if classes is None else _chosen(found, classes, folder)
    check_files_differ(
        folder,
        (
            (repr(str(file.relative_to(folder))), file)
            for place in ([folder] if split is None else _existing_splits(folder))
            for own in _class_folders(place)
            for file in _images_in(own)
        ),
    )
    # Only of the classes that are used: what lies in others does not matter to this run.
    _name_what_is_left_out(folder, [members[0].parent for members in chosen.values()])
    return read_classes(
        f"{folder.name}-{split or 'all'}",
        chosen,
        source="ImageFolder",
        split=split,
        image_size=image_size,
        channels=channels,
        cache_dir=cache_dir,
        progress=progress,
    )


def read_classes(
    name: str,
    files: Mapping[str, Sequence[Path]],
    *,
    source: str,
    split: str | None,
    image_size: int,
    channels: int,
    cache_dir: str | Path | None,
    progress: bool,
) -> ImageClasses:
    """Returns the images of the given files, by class.

    Args:
        name: first part of the cache file's name.
        files: the files of every class, in the order wanted.
        source: name of the data set.
        split: which part of it this is.
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
    return ImageClasses(
        images=torch.from_numpy(images), counts=counts, class_names=tuple(files), source=source, split=split
    )


def check_disjoint(classes_of: Mapping[str, Iterable[str]], root: Path, advice: str) -> None:
    """Raises if a class is in two splits, so that it would be learned from and judged on.

    Args:
        classes_of: the class names in each split's folder or file, by that one's name.
        root: where they are, for the message.
        advice: what else to do than removing the class from one of the two.

    Raises:
        DatasetError: if two splits share a class.
    """
    place: dict[str, str] = {}
    for split, names in classes_of.items():
        for name in names:
            if place.setdefault(name, split) != split:
                raise DatasetError(
                    f"`root` is {str(root)!r}, in which the class {name!r} is in {place[name]!r} and in {split!r}: "
                    "splits are of classes, and one in two splits would be both learned from and judged on. Remove it "
                    f"from one of them{advice}."
                )


def check_files_differ(root: Path, files: Iterable[tuple[str, Path]]) -> None:
    """Raises if a file is there twice, by a link or by name: what is learned from could be judged on.

    Cost: one look at the status of each file.

    Args:
        root: where they are, for the message.
        files: the images of all classes of all splits, each with what it is called in the message.

    Raises:
        DatasetError: if two of them are the same file.
    """
    seen: dict[tuple[int, int], str] = {}
    for name, file in files:
        try:
            status = file.stat()
        except OSError:
            continue  # What is read is looked at when it is read, and the rest is not missed.
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            raise DatasetError(
                f"`root` is {str(root)!r}, in which {name} is the same file as {seen[identity]}: the image would count "
                "twice, and what is learned from could be judged on. Remove one of them."
            )
        seen[identity] = name


def split_parts(split: str, known: Iterable[str], otherwise: str = "") -> list[str]:
    """Returns the names that are joined by `+` in `split`.

    Args:
        split: one name or several.
        known: the names there are.
        otherwise: what else may be passed, for the message.

    Raises:
        ValueError: if one of them is unknown, or named twice.
    """
    parts = split.split("+") if isinstance(split, str) else []
    if not parts or not set(parts) <= set(known):
        raise ValueError(
            f"`split` is {split!r}, which names no split. Use {', '.join(map(repr, known))}, or several joined by "
            f"'+'{otherwise}."
        )
    if len(set(parts)) != len(parts):
        raise ValueError(
            f"`split` is {split!r}, which names a split twice: each image would count twice, and support and query "
            "could share it. Name each split once."
        )
    return parts


def split_folder(root: Path, part: str) -> Path | None:
    """Returns the folder of one split, or None if there is none."""
    return next((root / name for name in SPLIT_FOLDERS[part] if (root / name).is_dir()), None)


def _checked_root(root: str | Path) -> Path:
    if root is None:
        raise TypeError(
            "`root` is None, a NoneType: it says where the images are, and has no default. Pass the path of the "
            "folder: `root=...`, or `dataset.root=...` on the command line."
        )
    folder = data_folder(root)
    if folder is None or not folder.is_dir():
        raise DatasetError(
            f"`root` is {str(root)!r}, which is no folder: images are read from its subfolders. Pass the folder that "
            "holds them."
        )
    return folder


def _parts(root: Path, split: str | None) -> list[Path]:
    """Returns the folders that hold the class folders."""
    if split is None:
        return [root]
    folders: list[Path] = []
    for part in split_parts(split, SPLIT_FOLDERS, "; None if the classes lie in `root` itself"):
        folder = split_folder(root, part)
        if folder is None:
            raise DatasetError(
                f"`root` is {str(root)!r}, which has no folder {' or '.join(map(repr, SPLIT_FOLDERS[part]))} for the "
                f"split {part!r}. Sort the class folders into one folder per split, or pass `split=None`."
            )
        folders.append(folder)
    check_disjoint(
        {folder.name: [path.name for path in _class_folders(folder)] for folder in _existing_splits(root)},
        root,
        "; or, if the folders divide the images of each class, merge them and pass `split=None`",
    )
    return folders


def _existing_splits(root: Path) -> list[Path]:
    # Splits that are not asked for count as well: what is shared with them would spoil a later judgement.
    return [folder for folder in (split_folder(root, part) for part in SPLIT_FOLDERS) if folder is not None]


def _class_folders(folder: Path) -> list[Path]:
    # File systems list folders in orders of their own; sorted, a seed draws the same images on each of them.
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes_in(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in _class_folders(folder):
        files = _images_in(path)
        if not files:
            raise DatasetError(_without_image(path))
        found[path.name] = files
    if not found:
        images = sum(is_image(file) for file in folder.iterdir())
        raise DatasetError(
            f"`root` has {str(folder)!r} without a subfolder{f', with {images} images in it' if images else ''}: each "
            "class is a folder of images. Sort the images into one folder per class."
        )
    return found


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if is_image(file))


def _without_image(folder: Path) -> str:
    inside = sorted(path.name for path in _class_folders(folder))
    if inside:
        return (
            f"`root` has the class folder {str(folder)!r} with the folders {inside[:3]} in it ({len(inside)} in all) "
            "and no image beside them: the classes lie one level deeper. Pass one such folder, "
            f"`root={str(folder)!r}`, or move the class folders of all of them into one."
        )
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return (
        f"`root` has the class folder {str(folder)!r} without an image ({f'it holds {files[:3]}' if files else 'empty'}"
        "; PNG, JPEG, TIFF, GIF and what else Pillow reads are images): a class without images cannot be drawn. Remove "
        "the folder, or point `root` at the folder that holds the classes."
    )


def _name_what_is_left_out(root: Path, folders: Iterable[Path]) -> None:
    """Warns of what lies in class folders and is neither an image nor known to be none."""
    entries = [path for folder in folders for path in folder.iterdir()]
    left_out = sorted(str(path.relative_to(root)) for path in entries if not (is_image(path) or is_companion(path)))
    if left_out:
        warnings.warn(
            f"`root` is {str(root)!r}, in whose class folders {len(left_out)} entries are left out, which are folders "
            f"or no images by their suffix: {', '.join(left_out[:5])}{', ...' if left_out[5:] else ''}. Convert those "
            "that are images to PNG, move those of folders up, and remove the rest.",
            stacklevel=3,
        )


def _chosen(found: Mapping[str, list[Path]], classes: Sequence[str], root: Path) -> dict[str, list[Path]]:
    # A text is a sequence of its letters, and would be taken for a list of classes.
    is_list = isinstance(classes, Sequence) and all(isinstance(name, str) for name in classes)
    if not is_list or isinstance(classes, str) or not classes or len(set(classes)) < len(classes):
        raise ValueError(
            f"`classes` is {classes!r}: it lists the names of classes, each once. Write for example "
            f"`classes={sorted(found)[:2]}`."
        )
    missing = [name for name in classes if name not in found]
    if missing:
        raise DatasetError(
            f"`root` is {str(root)!r}, which lacks the classes {missing[:5]} ({len(missing)} of {len(classes)} "
            "wanted): the copy is incomplete, or of another data set. Compare the names of its folders."
        )
    return {name: found[name] for name in classes}
