"""mini-ImageNet: 100 classes of ImageNet, 600 images each, in one of its usual layouts."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hypertorch.checks.values import check_switch
from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets.data_folder import data_folder
from hypertorch.fewshot.datasets.image_classes import ImageClasses
from hypertorch.fewshot.datasets.image_folder import (
    SPLIT_FOLDERS,
    ImageFolder,
    check_disjoint,
    check_files_differ,
    read_classes,
    split_folder,
    split_parts,
)
from hypertorch.fewshot.datasets.image_size import check_image_size
from hypertorch.fewshot.datasets.regular_files import check_regular

_CSV = {"meta_train": "train.csv", "meta_val": "val.csv", "meta_test": "test.csv"}
_HOW_TO_GET = (
    "Put `train.csv`, `val.csv` and `test.csv` (columns filename,label) beside a folder `images`, or one folder of "
    "class folders per split, into a folder and pass it: `root=...`, or `dataset.root=...` on the command line."
)


def MiniImageNet(  # noqa: N802  (made like an instance, as the other data sets)
    root: str | Path | None = None,
    *,
    split: str,
    image_size: int = 84,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> ImageClasses:
    """Returns one split of mini-ImageNet: 64, 16 or 20 classes of colour images.

    Two layouts are in use, and both are read: split files `train.csv`, `val.csv` and `test.csv` (Ravi and Larochelle)
    with the files they name in `images/` or beside them, or folders of class folders, `train/<class>/<image>`. ImageNet
    may not be passed on, so there is no download.

    Cost: about a minute at first, then from the cache; `classes * 600 * 3 * image_size**2` bytes.

    Args:
        root: the folder; a subfolder `mini_imagenet` is looked into as well. By default the environment variable
            HYPERTORCH_DATA says where.
        split: `"meta_train"`, `"meta_val"`, `"meta_test"`, or several joined by `+`.
        image_size: height and width (unit: pixels); images that are not square are cropped to the
            centred square of their shorter side, not squeezed, and then scaled.
        cache_dir: folder for decoded images; by default the user's cache folder.
        progress: shows a bar while decoding.

    Raises:
        TypeError: if `root` is no path, or `image_size` no integer.
        ValueError: if `split` names none, or one twice, or `image_size` is out of range.
        DatasetError: if the data is missing, incomplete or damaged, or splits share a class or a file.

    References:
        Vinyals et al. (2016), Matching networks for one shot learning, section 4.1.2; Ravi and Larochelle (2017),
        Optimization as a model for few-shot learning (the split).
    """
    check_switch("progress", progress)
    # Refused before the folder is looked for: a misspelt split is no missing data.
    parts = split_parts(split, _CSV)
    check_image_size(image_size)
    folder = data_folder(root)
    if folder is None:
        raise DatasetError(
            f"`root` is not given, and HYPERTORCH_DATA is not set: mini-ImageNet is not found. {_HOW_TO_GET}"
        )
    folder = folder / "mini_imagenet" if (folder / "mini_imagenet").is_dir() else folder
    _check_layout(folder, parts)
    if not all((folder / _CSV[part]).is_file() for part in parts):
        classes = ImageFolder(folder, split=split, image_size=image_size, cache_dir=cache_dir, progress=progress)
        return replace(classes, source="MiniImageNet")
    return read_classes(
        f"mini_imagenet-{split}",
        _read_lists(folder, parts),
        source="MiniImageNet",
        split=split,
        image_size=image_size,
        channels=3,
        cache_dir=cache_dir,
        progress=progress,
    )


def _check_layout(root: Path, parts: Sequence[str]) -> None:
    """Raises unless all splits wanted are there as split files, or all as folders."""
    if not root.is_dir():
        raise DatasetError(
            f"`root` is {str(root)!r}, which is no folder: mini-ImageNet is not found there. {_HOW_TO_GET}"
        )
    without_list = [part for part in parts if not (root / _CSV[part]).is_file()]
    without_folder = [part for part in parts if split_folder(root, part) is None]
    if without_list and without_folder:
        part = next((part for part in without_list if part in without_folder), without_list[0])
        folders = " or ".join(map(repr, SPLIT_FOLDERS[part]))
        lacking = f"no {_CSV[part]!r} and no folder {folders} for the split {part!r}"
        if part not in without_folder:
            lacking = f"a folder for {part!r}, but only a file for {without_folder[0]!r}"
        raise DatasetError(
            f"`root` is {str(root)!r}, which has {lacking}: mini-ImageNet is read from one file per split or from one "
            f"folder per split. {_HOW_TO_GET}"
        )


def _read_lists(root: Path, parts: Sequence[str]) -> dict[str, list[Path]]:
    """Returns the files of each class that the split files of `parts` name, each file once."""
    # Not of `parts` alone, for the check below.
    lists = {part: _read_list(root / name) for part, name in _CSV.items() if (root / name).is_file()}
    # Splits that are not asked for count as well: a class shared with them would spoil a later judgement.
    check_disjoint({_CSV[part]: {row.label for row in rows} for part, rows in lists.items()}, root, "")
    found: dict[str, list[Path]] = {}
    for part in parts:
        members: dict[str, list[Path]] = {}
        first_line: dict[Path, int] = {}
        for row in lists[part]:
            file = _existing(root, row, root / _CSV[part])
            # Resolved: a link, or another spelling of the path, is the same image.
            line = first_line.setdefault(file.resolve(), row.line)
            if line != row.line:
                raise DatasetError(
                    f"`root` has {str(root / _CSV[part])!r}, whose line {row.line} names {row.filename!r} of the class "
                    f"{row.label!r} again, after line {line}: the image would count twice, and support and "
                    "query could share it. Remove one of the lines."
                )
            members.setdefault(row.label, []).append(file)
        # Classes in alphabetical order, as the other layout has them.
        found |= dict(sorted(members.items()))
    check_files_differ(
        root,
        (
            (f"{row.filename!r} of {_CSV[part]!r}", file)
            for part, rows in lists.items()
            for row in rows
            if (file := _found(root, row)) is not None
        ),
    )
    return found


class _Row(NamedTuple):
    filename: str
    label: str
    line: int


def _read_list(path: Path) -> list[_Row]:
    """Returns the rows of a split file."""
    check_regular(path)
    found: list[_Row] = []
    try:
        # Spreadsheets put a byte order mark in front, which is no part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = list(rows.fieldnames or ())
            if columns.count("filename") != 1 or columns.count("label") != 1:
                raise DatasetError(
                    f"`root` has {str(path)!r} with the columns {columns}: `filename` and `label` are needed, "
                    f"each once. {_HOW_TO_GET}"
                )
            for row in rows:
                name, label = row["filename"], row["label"]
                # A row that is too long has the rest under None.
                if None in row or not (name and name.strip()) or not (label and label.strip()) or "\0" in name + label:
                    raise DatasetError(
                        f"`root` has {str(path)!r}, whose line {rows.line_num} lacks a file name or a label, or has "
                        f"more than the heading: the file was cut off or changed. {_HOW_TO_GET}"
                    )
                found.append(_Row(row["filename"], row["label"], rows.line_num))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(
            f"`root` has {str(path)!r}, which cannot be read as a table in UTF-8 ({error}): it was saved in another "
            "encoding, or is damaged. Save it as CSV in UTF-8, or copy it again."
        ) from error
    if not found:
        raise DatasetError(
            f"`root` has {str(path)!r}, which names no file under its heading: the split would be empty. {_HOW_TO_GET}"
        )
    return found


def _existing(root: Path, row: _Row, table: Path) -> Path:
    """Returns the file that a row names, which lies in `root`, or in the folder of images that `root` links to."""
    file = _found(root, row)
    if file is None:
        raise DatasetError(
            f"`root` is {str(root)!r}, whose split files name {row.filename[:200]!r}, which is neither in `images` nor "
            f"beside them: the copy is incomplete. {_HOW_TO_GET}"
        )
    inside = [place.resolve() for place in (root, root / "images")]
    if not any(file.resolve().is_relative_to(place) for place in inside):
        raise DatasetError(
            f"`root` has {str(table)!r}, whose line {row.line} names {row.filename!r} of the class {row.label!r}, "
            "which leads out of the folder: a table may not say which other files are read. Put the image into "
            "`images`, and name it by its path from there."
        )
    return file


def _found(root: Path, row: _Row) -> Path | None:
    # Copies differ in where the images lie: in one folder, beside the split files, or by class.
    for candidate in (root / "images" / row.filename, root / row.filename, root / row.label / row.filename):
        try:
            if candidate.exists():
                return candidate
        # A name that is too long; there is no such file.
        except OSError:
            continue
    return None
