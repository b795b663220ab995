"""mini-ImageNet: 100 classes of ImageNet, 600 images each, in one of its usual layouts."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets.image_classes import ImageClasses
from hypertorch.fewshot.datasets.image_folder import ImageFolder, read_classes

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
        image_size: height and width (unit: pixels); images are cropped to a centred square and scaled.
        cache_dir: folder for decoded images; by default the user's cache folder.
        progress: shows a bar while decoding.

    Raises:
        ValueError: if `split` names none.
        DatasetError: if the data is missing, incomplete or damaged.

    References:
        Vinyals et al. (2016), Matching networks for one shot learning, section 4.1.2; Ravi and Larochelle (2017),
        Optimization as a model for few-shot learning (the split).
    """
    unknown = [part for part in split.split("+") if part not in _CSV]
    if unknown:
        raise ValueError(
            f"`split` is {split!r}, which names no split. Use {', '.join(map(repr, _CSV))}, or several joined by '+'."
        )
    given = root if root is not None else os.environ.get("HYPERTORCH_DATA")
    if not given:
        raise DatasetError(
            f"`root` is not given, and HYPERTORCH_DATA is not set: mini-ImageNet is not found. {_HOW_TO_GET}"
        )
    folder = Path(given).expanduser()
    folder = folder / "mini_imagenet" if (folder / "mini_imagenet").is_dir() else folder
    options = {"image_size": image_size, "cache_dir": cache_dir, "progress": progress}
    lists = [folder / _CSV[part] for part in split.split("+")]
    if not all(path.is_file() for path in lists):
        return ImageFolder(folder, split=split, **options)  # type: ignore[arg-type]
    files: dict[str, list[Path]] = {}
    for path in lists:
        for name, members in _read_list(path).items():
            files.setdefault(name, []).extend(members)
    return read_classes(f"mini_imagenet-{split}", files, channels=3, **options)  # type: ignore[arg-type]


def _read_list(path: Path) -> dict[str, list[Path]]:
    """Returns the files of each class that a split file names."""
    found: dict[str, list[Path]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or not {"filename", "label"} <= set(rows.fieldnames):
            raise DatasetError(
                f"`root` has {str(path)!r} with the columns {rows.fieldnames}: `filename` and `label` are needed. "
                f"{_HOW_TO_GET}"
            )
        for row in rows:
            found.setdefault(row["label"], []).append(_existing(path.parent, row["filename"], row["label"]))
    return dict(sorted(found.items()))


def _existing(folder: Path, name: str, label: str) -> Path:
    for candidate in (folder / "images" / name, folder / name, folder / label / name):
        if candidate.is_file():
            return candidate
    raise DatasetError(
        f"`root` is {str(folder)!r}, whose split files name {name!r}, which is neither in `images` nor beside them: "
        f"the copy is incomplete. {_HOW_TO_GET}"
    )
