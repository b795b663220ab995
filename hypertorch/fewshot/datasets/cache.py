"""Arrays kept on disk because they take seconds to make; never trusted blindly, and never required."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

# A safetensors file is numbers and text: nothing in it can run when it is read, as in a pickle.
_NAME = "images"


def default_cache_dir() -> Path:
    """Returns the user's cache folder for hypertorch, as the operating system defines it."""
    return Path(pooch.os_cache("hypertorch"))


def cached_array(
    name: str, key: str, make: Callable[[], np.ndarray], cache_dir: str | Path | None = None
) -> np.ndarray:
    """Returns `make()`, from disk where an earlier call with the same key has left an undamaged copy.

    `key` has to say everything that the array depends on. A file with another key, a truncated file or one with a
    changed byte is made again; a file appears under its name only when complete, so processes may share the folder. A
    folder that cannot be written costs time on the next call and nothing else.

    Args:
        name: first part of the file's name, for people who look into the folder.
        key: what the array depends on.
        make: computes the array.
        cache_dir: folder of the cache; by default the user's cache folder.
    """
    if cache_dir is not None and not isinstance(cache_dir, (str, Path)):
        raise TypeError(
            f"`cache_dir` is {cache_dir!r}, a {type(cache_dir).__name__}: it says where decoded images are kept. Pass "
            "the path of a folder, or None for the user's cache folder."
        )
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    # The name holds 64 bits of the hash; the whole key is compared after reading, so that names may collide.
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    array = _read(path, key)
    if array is None:
        array = make()
        _write(path, key, array)
    return array


def _read(path: Path, key: str) -> np.ndarray | None:
    """Returns the stored array, or None where there is none to be trusted."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            array = file.get_tensor(_NAME)
    # Cut off, of another format, or not there: all mean the same here, to make it again.
    except (OSError, SafetensorError):
        return None
    # The format has no checksum of its own: a changed byte would be a silently wrong pixel.
    return array if metadata == _metadata(key, array) else None


def _write(path: Path, key: str, array: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, as a file can be renamed in one go only within a file system; of a name of its own, as
        # other processes may write the same array now.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(save({_NAME: array}, _metadata(key, array)))
            Path(temporary).replace(path)
        except OSError:
            # What is left of a failed write would keep a full disk full.
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(
            f"`cache_dir` {str(path.parent)!r} cannot be written ({error}): the images will be made again next time. "
            "Pass a `cache_dir` that is writable.",
            # The line that asks for the data set, behind this function, `cached_array` and the data set itself.
            stacklevel=4,
        )


def _metadata(key: str, array: np.ndarray) -> dict[str, str]:
    # The bytes alone do not tell (2, 3) from (3, 2).
    content = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    content.update(np.ascontiguousarray(array).data)
    return {"key": key, "sha256": content.hexdigest()}
