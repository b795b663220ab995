"""Reading CIFAR-100: its official archive, folders of classes, or one mosaic per class."""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets.cache import cached_array
from hypertorch.fewshot.datasets.image_files import is_image, open_image, read_images
from hypertorch.fewshot.datasets.regular_files import check_regular

SIDE = 32
# 500 for training and 100 for testing in CIFAR-100; CIFAR-FS splits by class and uses all of them.
PER_CLASS = 600
# The official pickle of the training images has 155 MB.
_LARGEST = 2**28
# What reading a damaged archive or pickle raises.
_DAMAGED = (
    *(OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, pickle.UnpicklingError, MemoryError),
    *(AttributeError, ImportError, LookupError, OverflowError, RecursionError, TypeError, ValueError),
)
_ARCHIVE = "cifar-100-python.tar.gz"
_UNPACKED = "cifar-100-python"
# 24 * 25 = 600 tiles.
_MOSAIC_ROWS, _MOSAIC_COLUMNS = 24, 25
HOW_TO_GET = (
    f"Put the official archive {_ARCHIVE!r} (or its unpacked folder {_UNPACKED!r}), or one folder of 32 x 32 images "
    "per class, into a folder and pass it: `root=...`, or `dataset.root=...` on the command line."
)


def read_cifar100(
    root: Path, classes: Sequence[str], *, cache_dir: str | Path | None = None, progress: bool = False
) -> np.ndarray:
    """Returns the 600 images of each of the given classes, from whichever layout lies under `root`.

    - the official archive for Python, packed or unpacked: pickled arrays, read by an unpickler that makes arrays,
      numbers, strings, lists and dicts and nothing else, so that a manipulated file cannot run code;
    - `root/<class>/<image>`, or `root/train/<class>/<image>` and `root/test/<class>/<image>`;
    - `root/classes/<class>.jpg` (or .png): one mosaic per class of 24 rows and 25 columns of tiles, in row order.

    Args:
        root: the folder.
        classes: official names of fine classes.
        cache_dir: folder for decoded images; by default the user's cache folder.
        progress: shows a bar while decoding.

    Returns:
        uint8 `(classes, 600, 3, 32, 32)`.

    Raises:
        DatasetError: if nothing of the kind is there, or files are missing, damaged or of another size.
    """
    # The official files come before what somebody made of them, and of these the unpacked ones, which need no
    # decompression.
    archive = _find(root, _ARCHIVE)
    unpacked = _find(root, _UNPACKED)
    mosaics = _find(root, "classes")
    if unpacked is not None or archive is not None:
        return _from_pickles(_read_pickles(unpacked, archive), classes)
    if mosaics is not None and any(is_image(path) for path in mosaics.iterdir()):
        return _from_mosaics(mosaics, classes, cache_dir, progress)
    return _from_folders(root, classes, cache_dir, progress)


def _find(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / "cifar100" / name) if path.exists()), None)


class _ArraysOnly(pickle.Unpickler):
    """Makes arrays and plain containers; any other class or function in the file is refused."""

    _ALLOWED = frozenset(
        {
            # What arrays are rebuilt by, before numpy 2 and since.
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            # How Python 3 writes bytes in the old protocols; it makes bytes of text and can do no harm.
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for `{module}.{name}`, which arrays of images do not need")
        # The first of the two spellings is where old files have it and where new versions of numpy warn.
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_pickles(unpacked: Path | None, archive: Path | None) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    source = unpacked if unpacked is not None else archive
    try:
        for name in ("train", "test", "meta"):
            raw = _unpacked(unpacked / name) if unpacked is not None else _member(archive, name)
            _check_operations(raw)
            # Python 2 wrote the files: its strings hold bytes, each of which latin1 reads as one character.
            contents[name] = _ArraysOnly(io.BytesIO(raw), encoding="latin1").load()
        _check_contents(contents)
    except _DAMAGED as error:
        raise DatasetError(
            f"`root` has {str(source)!r}, which cannot be read as CIFAR-100 ({str(error) or type(error).__name__}): it "
            f"is incomplete, damaged or manipulated. {HOW_TO_GET}"
        ) from error
    return contents


def _unpacked(file: Path) -> bytes:
    _check_length(check_regular(file).st_size, file.name)
    return file.read_bytes()


def _member(archive: Path | None, name: str) -> bytes:
    assert archive is not None
    check_regular(archive)
    # Read member by member in memory: nothing is unpacked, so no path in the archive can lead out of the folder.
    with tarfile.open(archive) as packed:
        member = packed.getmember(f"{_UNPACKED}/{name}")
        file = packed.extractfile(member) if member.isreg() else None
        if file is None:
            raise ValueError(f"{name!r} is no file")
        _check_length(member.size, name)
        return file.read()


def _check_length(length: int, name: str) -> None:
    if length > _LARGEST:
        raise ValueError(f"{name!r} has {length} bytes, of which the official one has less than {_LARGEST}")


def _check_operations(raw: bytes) -> None:
    """Raises if a pickle is cut off, or numbers an object of its memory by more than it has bytes."""
    for operation, argument, _ in pickletools.genops(raw):
        # The unpickler makes a table as long as the largest number, which four bytes let take 64 GiB.
        if operation.name in ("PUT", "LONG_BINPUT") and argument is not None and argument > len(raw):
            raise ValueError(f"it numbers an object by {argument}")


def _check_contents(contents: dict[str, Any]) -> None:
    """Raises if what the pickles hold is not what CIFAR-100 holds."""
    for name, content in contents.items():
        if not isinstance(content, dict):
            raise ValueError(f"{name!r} holds a {type(content).__name__} where a dict is expected")
    names = contents["meta"]["fine_label_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("'fine_label_names' is no list of names")
    for name in ("train", "test"):
        pixels, labels = contents[name]["data"], contents[name]["fine_labels"]
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * SIDE * SIDE,):
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise ValueError(
                f"the pixels of {name!r} are {kind} of shape {np.shape(pixels)} instead of uint8 of (images, 3072)"
            )
        is_list = isinstance(labels, list) and all(isinstance(label, int) for label in labels)
        if not is_list or len(labels) != len(pixels) or not set(labels) <= set(range(len(names))):
            raise ValueError(f"'fine_labels' of {name!r} are no {len(pixels)} numbers below {len(names)}")


def _from_pickles(contents: dict[str, Any], classes: Sequence[str]) -> np.ndarray:
    names = list(contents["meta"]["fine_label_names"])
    pixels = np.concatenate([contents[part]["data"] for part in ("train", "test")])
    labels = np.concatenate([np.asarray(contents[part]["fine_labels"]) for part in ("train", "test")])
    # A row holds all red values, then all green, then all blue, each line by line.
    images = pixels.reshape(-1, 3, SIDE, SIDE)
    chosen = []
    for name in classes:
        members = images[labels == names.index(name)] if name in names else images[:0]
        if len(members) != PER_CLASS:
            raise DatasetError(
                f"`root` has a CIFAR-100 in which {name!r} has {len(members)} images instead of {PER_CLASS}: it was "
                f"changed or cut off. {HOW_TO_GET}"
            )
        chosen.append(members)
    return np.stack(chosen)


def _from_mosaics(folder: Path, classes: Sequence[str], cache_dir: str | Path | None, progress: bool) -> np.ndarray:
    files = {path.stem: path for path in sorted(folder.iterdir()) if is_image(path)}
    _check_classes(folder, classes, set(files))
    # By content: there are a hundred files at most, and a replaced mosaic is noticed whatever its date.
    digest = hashlib.sha256()
    for name in classes:
        check_regular(files[name])
        digest.update(files[name].read_bytes())

    def decode_all() -> np.ndarray:
        images = np.empty((len(classes), PER_CLASS, 3, SIDE, SIDE), dtype=np.uint8)
        for image, name in zip(images, track(classes, "Decoding CIFAR-100", disable=not progress), strict=True):
            pixels = np.asarray(open_image(files[name], "RGB"))
            expected = (_MOSAIC_ROWS * SIDE, _MOSAIC_COLUMNS * SIDE, 3)
            if pixels.shape != expected:
                raise DatasetError(
                    f"`root` has {str(files[name])!r} of shape {pixels.shape} instead of {expected}: it is no mosaic "
                    f"of {_MOSAIC_ROWS} x {_MOSAIC_COLUMNS} images. {HOW_TO_GET}"
                )
            # Axes from (row, y, column, x, colour) to (row, column, y, x, colour), which is tile after tile.
            tiles = pixels.reshape(_MOSAIC_ROWS, SIDE, _MOSAIC_COLUMNS, SIDE, 3).swapaxes(1, 2)
            image[:] = tiles.reshape(PER_CLASS, SIDE, SIDE, 3).transpose(0, 3, 1, 2)
        return images

    # The number is to be raised whenever the same mosaics would be cut into other images.
    return cached_array("cifar100", f"mosaics 1 {' '.join(classes)} {digest.hexdigest()}", decode_all, cache_dir)


def _from_folders(root: Path, classes: Sequence[str], cache_dir: str | Path | None, progress: bool) -> np.ndarray:
    parts = [root / name for name in ("train", "test")]
    # One of the classes is itself called "train".
    places = parts if all((part / "apple").is_dir() for part in parts) else [root]
    _check_classes(root, classes, {path.name for place in places if place.is_dir() for path in place.iterdir()})
    files = []
    for name in classes:
        members = [file for place in places for file in sorted((place / name).glob("*")) if is_image(file)]
        if len(members) != PER_CLASS:
            raise DatasetError(
                f"`root` is {str(root)!r}, in which the class {name!r} has {len(members)} images instead of "
                f"{PER_CLASS}: CIFAR-FS uses the training and the test images of CIFAR-100. {HOW_TO_GET}"
            )
        files += members
    images = read_images("cifar100", files, image_size=SIDE, channels=3, cache_dir=cache_dir, progress=progress)
    return images.reshape(len(classes), PER_CLASS, 3, SIDE, SIDE)


def _check_classes(folder: Path, classes: Sequence[str], found: set[str]) -> None:
    missing = [name for name in classes if name not in found]
    if missing:
        raise DatasetError(
            f"`root` is {str(folder)!r}, which lacks the classes {missing[:5]} ({len(missing)} of {len(classes)} "
            f"wanted): it holds no complete CIFAR-100. {HOW_TO_GET}"
        )
