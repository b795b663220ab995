"""A small data set in Omniglot's official layout."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from hypertorch.fewshot.datasets.omniglot_partitions import OmniglotPart

SMALL_BACKGROUND = OmniglotPart(
    folder="images_background", alphabets=(("Armenian", 2), ("Greek", 3)), drawings=4, side=15
)
SMALL_EVALUATION = OmniglotPart(folder="images_evaluation", alphabets=(("Gurmukhi", 2),), drawings=4, side=15)


def ink(position: int, drawing: int, side: int = 15) -> np.ndarray:
    """Returns a drawing that no other character and drawing has, paper 0 and ink 255, with no symmetry."""
    image = np.zeros((side, side), dtype=np.uint8)
    image[1, 1 : 2 + position] = 255
    image[3 : 4 + drawing, 1] = 255
    image[side - 2, 2:7] = 255
    return image


def png(image: np.ndarray) -> bytes:
    """Returns a 1-bit PNG file with black ink, as the official ones are."""
    buffer = io.BytesIO()
    Image.fromarray(255 - image).convert("1").save(buffer, format="PNG")
    return buffer.getvalue()


def official_files(part: OmniglotPart) -> dict[str, bytes]:
    """Returns the content of every file of a part by its path."""
    return {
        f"{part.folder}/{character.folder}/{position + 1:04d}_{drawing + 1:02d}.png": png(
            ink(position, drawing, part.side)
        )
        for position, character in enumerate(part.characters)
        for drawing in range(part.drawings)
    }


def write_archive(root: Path, part: OmniglotPart, files: dict[str, bytes] | None = None) -> Path:
    """Writes a part as an archive, and returns its path."""
    path = root / f"{part.folder}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (official_files(part) if files is None else files).items():
            archive.writestr(name, content)
    return path


def write_folders(root: Path, part: OmniglotPart) -> Path:
    """Writes a part as folders, and returns the top one."""
    for name, content in official_files(part).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / part.folder


def broken_png() -> bytes:
    """Returns a PNG file whose second block of pixels has lost its name, at which Pillow raises a `SyntaxError`."""

    def block(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = zlib.compress(bytes(15 * 16))
    head = block(b"IHDR", struct.pack(">IIBBBBB", 15, 15, 8, 0, 0, 0, 0))
    blocks = (block(b"IDAT", pixels[:5]), block(b"\0\1\2\3", pixels[5:]), block(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(blocks)
