"""Decoding image files of any size into equal squares of bytes."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from rich.progress import track

from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets.cache import cached_array
from hypertorch.fewshot.datasets.image_size import check_image_size
from hypertorch.fewshot.datasets.regular_files import check_regular

# Formats that Pillow recognises without reading pixels itself: data, films, and drawings that need another program.
_NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# What lies beside images, and is none: notes, tables, annotations, what file managers write.
_COMPANIONS = frozenset((".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".html", ".ini", ".db"))
# What Pillow's readers raise of a damaged file: each of them reads its numbers from wherever the file says they are.
_UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, RuntimeError, OverflowError, MemoryError),
    struct.error,
)
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
# Part of the cache's key: to be raised whenever the same files would be decoded to other pixels.
_DECODING = "upright, on white, fit, Lanczos, 4"


@cache
def _suffixes() -> frozenset[str]:
    """Returns the suffixes of the formats that Pillow reads as it is installed."""
    Image.init()  # loads every format, which takes a tenth of a second
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind not in _NOT_READ)


def is_image(path: Path) -> bool:
    """Returns whether a file's name is that of an image (and not one of the hidden files that systems add)."""
    return path.suffix.lower() in _suffixes() and not path.name.startswith(".")


def is_companion(path: Path) -> bool:
    """Returns whether a file's name is that of a note or a table beside images, or hidden: nobody misses it there."""
    return path.suffix.lower() in _COMPANIONS or path.name.startswith(".")


def read_images(
    name: str,
    files: Sequence[Path],
    *,
    image_size: int,
    channels: int,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Returns images cropped to a centred square and scaled by Lanczos' filter, from the cache after the first time.

    The square is as large as the shorter side: proportions stay, and what lies outside on the longer side is lost.
    Images of 16 bits are scaled to 8. What is transparent shows white, as on paper, and photographs are turned as
    their camera was held. Of several pages or frames, the first is taken.

    Cost: about 1 ms per photograph at first, milliseconds in all from the cache. The cache's key holds the path, size
    and time of every file.

    Args:
        name: first part of the cache file's name.
        files: the files, at least one.
        image_size: height and width of the result (unit: pixels).
        channels: 1 for grey, 3 for colour.
        cache_dir: folder of the cache; by default the user's cache folder.
        progress: shows a bar while decoding.

    Returns:
        uint8 `(files, channels, image_size, image_size)`.

    Raises:
        ValueError: if `channels` is neither 1 nor 3, or the images do not fit into memory.
        DatasetError: if a file is no readable image, empty, no file (such as a pipe), or a link to nothing.
    """
    if isinstance(channels, bool) or not isinstance(channels, int) or channels not in (1, 3):
        raise ValueError(f"`channels` is {channels!r}: images are grey, of one channel, or coloured. Use 1 or 3.")
    check_image_size(image_size, images=len(files), channels=channels)
    digest = hashlib.sha256()
    for file in files:
        # All files are looked at before the first is decoded, so that a bad one is known at once and not after minutes.
        status = check_regular(file)
        # Size and time, not content: with a full cache, none of thousands of files has to be opened.
        # A name is bytes, which need not be UTF-8.
        digest.update(os.fsencode(file) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    # Another version of Pillow may decode or scale to other pixels.
    key = f"{image_size} {channels} {_DECODING} Pillow {PIL.__version__} {digest.hexdigest()}"

    def decode_all() -> np.ndarray:
        images = np.empty((len(files), channels, image_size, image_size), dtype=np.uint8)
        for image, file in zip(images, track(files, f"Decoding {name}", disable=not progress), strict=True):
            image[:] = _decode(file, image_size, channels)
        return images

    return cached_array(name, key, decode_all, cache_dir)


def open_image(file: Path, mode: str) -> Image.Image:
    """Returns a decoded image in a Pillow mode ("L" or "RGB"), whole and in its own size, upright, of 8 bits, on white.

    Raises:
        DatasetError: if the file is no readable image.
    """
    check_regular(file)
    with explained(f"{str(file)!r}", "Copy it again, or remove it."), Image.open(file) as image:
        # Cameras store the picture as the sensor lay, with a note of how to turn it.
        upright = ImageOps.exif_transpose(image)
        return _on_white(_eight_bits(upright, image)).convert(mode)


@contextmanager
def explained(file: str, advice: str) -> Iterator[None]:
    """Raises what Pillow raises while it reads a file as an error of the data set.

    Args:
        file: which one, for the message.
        advice: what to do about it, a sentence.

    Raises:
        DatasetError: if the file is no readable image, or one of more pixels than Pillow's limit.
    """
    try:
        with warnings.catch_warnings():
            # Between its limit and twice its limit Pillow warns, and decodes gigabytes all the same.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DatasetError(
            f"{file} has more pixels than {Image.MAX_IMAGE_PIXELS}, up to which an image is decoded ({error}): a small "
            "file may ask for all memory. Scale it down, or remove it; if it is to be trusted, raise the limit, "
            "`PIL.Image.MAX_IMAGE_PIXELS`."
        ) from error
    except _UNREADABLE as error:
        raise DatasetError(
            f"{file} is no readable image ({error}): it is damaged, or not what its name says. {advice}"
        ) from error


def _eight_bits(image: Image.Image, source: Image.Image) -> Image.Image:
    """Returns a grey image of 16 bits scaled to 8, and any other of 8 as it is.

    Args:
        image: the image.
        source: as it was opened, with what its format says of it.

    Raises:
        ValueError: if the brightness of white is not known.
    """
    # Pillow opens PGM files of 16 bits as "I", and in older versions PNG files; of other formats "I" means 32 bits.
    if image.mode == "F" or (image.mode == "I" and source.format not in ("PNG", "PPM")):
        raise ValueError("32 bits per pixel, of which none says how bright white is: save it with 8 or 16")
    # Pillow itself reads 16-bit colour as 8 bits, but would clip 16-bit grey, making nearly all of it white.
    if not image.mode.startswith("I"):
        return image
    # Of other formats, such as FITS, 16 bits may have a sign.
    if source.format not in ("PNG", "PPM", "TIFF", "JPEG2000"):
        raise ValueError(f"16 bits per pixel in {source.format}, of which white is not known: save it as PNG")
    white, is_inverted = 65535, False
    if isinstance(source, TiffImageFile):
        # Pillow leaves 12 bits as they are, and 16 bits whose 0 is white.
        white = 2 ** source.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        is_inverted = source.tag_v2.get(_PHOTOMETRIC) == 0
    # Wide enough for 255 * 65535, which the 16 bits of the file are not.
    levels = np.asarray(image).astype(np.int64)
    # Rounded to the nearest in integers, so exactly.
    scaled = ((levels * 255 + white // 2) // white).astype(np.uint8)
    return Image.fromarray(255 - scaled if is_inverted else scaled)


def _on_white(image: Image.Image) -> Image.Image:
    """Returns an image with its transparent parts laid on white, and one without any as it is."""
    # Conversion alone would drop the opacity, and show the colour underneath: black, mostly.
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _decode(file: Path, image_size: int, channels: int) -> np.ndarray:
    image = open_image(file, "L" if channels == 1 else "RGB")
    if image.size != (image_size, image_size):
        # Cropped, not squeezed: proportions are part of what tells classes apart.
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
