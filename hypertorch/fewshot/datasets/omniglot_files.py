"""Reading Omniglot in its official layout, as archives or as folders, and checking that it is complete."""

from __future__ import annotations

import hashlib
import io
import lzma
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
import PIL
from PIL import Image
from rich.progress import track

from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets.cache import cached_array
from hypertorch.fewshot.datasets.image_files import explained
from hypertorch.fewshot.datasets.image_size import check_image_size
from hypertorch.fewshot.datasets.omniglot_partitions import OmniglotPart
from hypertorch.fewshot.datasets.regular_files import check_regular

HOW_TO_GET = (
    "Download it with `scripts/download_data omniglot` (or `download=True`), or say where it lies: `root=...`, "
    "`dataset.root=...` on the command line, or the environment variable HYPERTORCH_DATA."
)
_REPLACE = "Delete it and download it again with `scripts/download_data omniglot`."
# The official drawings have hundreds of bytes; a member of an archive may promise any number (unit: bytes).
_LARGEST = 2**20
# Part of the cache's key: to be raised whenever the same files would be decoded to other pixels.
_DECODING = "ink 255, L, Lanczos, 1"


def read_part(
    root: Path, part: OmniglotPart, *, image_size: int, cache_dir: str | Path | None = None, progress: bool = False
) -> np.ndarray:
    """Returns all drawings of one part of Omniglot, decoded and scaled.

    The decoded array is cached under a key that holds the content of the archive (its SHA-256), or for folders the
    name, size and time of every file.

    Cost: about 0.15 ms per drawing at first, milliseconds for the whole part from the cache.

    Args:
        root: folder with `{part.folder}.zip` or the unpacked folder `{part.folder}`; the archive is preferred.
        part: which part, and what it should contain.
        image_size: height and width of the result (unit: pixels).
        cache_dir: folder of the cache; by default the user's cache folder.
        progress: shows a bar while decoding.

    Returns:
        uint8 `(characters, drawings, image_size, image_size)`, paper 0 and ink 255, in the order of `part.characters`.

    Raises:
        DatasetError: if files are missing, damaged, surplus, or not of the official size.
    """
    source = _open_source(root, part)
    key = f"{part} {image_size} {_DECODING} Pillow {PIL.__version__} {source.fingerprint()}"
    return cached_array(part.folder, key, lambda: _decode_all(source, part, image_size, progress), cache_dir)


class _Source(ABC):
    """The files of one part, wherever they are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def fingerprint(self) -> str:
        """Returns a string that changes when the files do."""

    @abstractmethod
    def names(self) -> list[str]:
        """Returns the paths of all PNG files, `{part.folder}/{alphabet}/characterNN/NNNN_DD.png`."""

    @abstractmethod
    def read(self, names: Iterable[str]) -> Iterable[bytes]:
        """Yields the content of the named files."""


class _Folder(_Source):
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self.names():
            status = check_regular(self.path.parent / name)
            # Not by content, which would open up to 19,280 files at every start.
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def names(self) -> list[str]:
        # Folders and archives list their files in any order; sorted, both give the same classes and drawings.
        return sorted(path.relative_to(self.path.parent).as_posix() for path in self.path.rglob("*.png"))

    def read(self, names: Iterable[str]) -> Iterable[bytes]:
        for name in names:
            yield (self.path.parent / name).read_bytes()


# Read in place: nothing is unpacked, so no path in the archive can lead out of the folder.
class _Archive(_Source):
    def fingerprint(self) -> str:
        with self.path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def names(self) -> list[str]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return sorted(name for name in archive.namelist() if name.endswith(".png"))
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise self._damaged(error) from error

    def read(self, names: Iterable[str]) -> Iterable[bytes]:
        with zipfile.ZipFile(self.path) as archive:
            for name in names:
                try:
                    if archive.getinfo(name).file_size > _LARGEST:
                        raise ValueError(f"{name!r} has {archive.getinfo(name).file_size} bytes")
                    content = archive.read(name)
                # zlib.error is no OSError; both it and a bad checksum mean damaged bytes. A member under a password is
                # a RuntimeError, and so is one of an unknown compression.
                except (
                    zipfile.BadZipFile,
                    zlib.error,
                    lzma.LZMAError,
                    EOFError,
                    OSError,
                    RuntimeError,
                    ValueError,
                ) as error:
                    raise self._damaged(error) from error
                yield content

    def _damaged(self, error: Exception) -> DatasetError:
        return DatasetError(
            f"`root` has {str(self.path)!r} ({self.path.stat().st_size} bytes), which is no complete zip archive "
            f"({error}): it was probably cut off while being copied or downloaded. {_REPLACE}"
        )


def _open_source(root: Path, part: OmniglotPart) -> _Source:
    archive, folder = root / f"{part.folder}.zip", root / part.folder
    if archive.is_file():
        return _Archive(archive)
    if folder.is_dir():
        return _Folder(folder)
    state = "has neither" if root.is_dir() else "does not exist, so there is neither"
    raise DatasetError(
        f"`root` is {str(root)!r}, which {state} {archive.name!r} nor the folder {folder.name!r}: this split of "
        f"Omniglot is in them. {HOW_TO_GET}"
    )


def _decode_all(source: _Source, part: OmniglotPart, image_size: int, progress: bool) -> np.ndarray:
    # Checked before anything is decoded: a missing drawing would shift all later ones into wrong classes.
    names = _checked_names(source, part)
    check_image_size(image_size, images=len(names))
    images = np.empty((len(names), image_size, image_size), dtype=np.uint8)
    contents = track(source.read(names), f"Decoding {part.folder}", total=len(names), disable=not progress)
    for image, name, content in zip(images, names, contents, strict=True):
        image[:] = _decode(content, name, source.path, part.side, image_size)
    return images.reshape(len(part.characters), part.drawings, image_size, image_size)


def _checked_names(source: _Source, part: OmniglotPart) -> list[str]:
    """Returns the paths of the drawings by character and drawing, after checking that each character is complete."""
    found: dict[str, list[str]] = {f"{part.folder}/{character.folder}": [] for character in part.characters}
    for name in source.names():
        if PurePosixPath(name).name.startswith(".") or name.startswith("__MACOSX"):
            continue  # what macOS adds to archives and folders
        folder = str(PurePosixPath(name).parent)
        if folder not in found:
            raise DatasetError(
                f"`root` has {str(source.path)!r} with {name!r}, which is not of Omniglot: the official part has "
                f"{len(part.alphabets)} alphabets with {len(part.characters)} characters and nothing else. Remove the "
                "file, or use the official archive."
            )
        found[folder].append(name)
    for folder, names in found.items():
        if len(names) != part.drawings:
            raise DatasetError(
                f"`root` has {str(source.path)!r}, in which {folder!r} has {len(names)} drawings instead of "
                f"{part.drawings}: the copy is incomplete or was changed. {_REPLACE}"
            )
    return [name for names in found.values() for name in sorted(names)]


def _decode(content: bytes, name: str, path: Path, side: int, image_size: int) -> np.ndarray:
    with (
        explained(f"`root` has {str(path)!r} with {name!r}, which", _REPLACE),
        Image.open(io.BytesIO(content)) as drawing,
    ):
        # Grey before scaling: images of one bit Pillow scales by the nearest pixel, whatever filter is asked for.
        paper = np.asarray(drawing.convert("L"))
    if paper.shape != (side, side):
        height, width = paper.shape
        raise DatasetError(
            f"`root` has {str(path)!r} with {name!r} of {width} x {height} pixels instead of {side} x {side}: these "
            "are not the official drawings but a converted copy. Use the official archives; scaling is done here, by "
            "`image_size`."
        )
    # The files have black ink. With paper at 0, zero padding and empty corners continue the paper.
    ink = Image.fromarray(255 - paper)
    return np.asarray(ink if image_size == side else ink.resize((image_size, image_size), Image.Resampling.LANCZOS))
