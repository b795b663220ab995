"""Files of named tensors with texts in their header: written whole or not at all, and checked when read."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hypertorch.errors import CheckpointError
from hypertorch.types import TensorDict, TensorMapping

_CHECKSUM = "hypertorch.checksum"
PARTIAL = ".partial"
"""Suffix of a file that is being written. A run that is killed meanwhile leaves it behind; it is never read."""


def write_tensor_file(path: Path, tensors: TensorMapping, texts: Mapping[str, str]) -> None:
    """Writes a safetensors file so that, whenever the process or the machine stops, it is whole or absent.

    Cost: a copy of the tensors in host memory where they are elsewhere, and one pass for a checksum.

    Args:
        path: the file; an existing one is replaced.
        tensors: what to write, from any device.
        texts: texts to keep in the file's header.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    on_host = _on_host(tensors)
    # In the same folder, because a rename across file systems fails.
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(on_host, partial, metadata={**texts, _CHECKSUM: _checksum(on_host, texts)})
        _flush_to_disk(partial)
        # A rename is atomic; without the flushes a power failure could keep the new name and lose the content.
        partial.replace(path)
        _flush_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(not_written(path, error)) from error


def not_written(path: Path, error: Exception) -> str:
    """Returns the message about a file or folder that could not be written, and why."""
    # Safetensors hands on the system's words, not its number.
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        reason, remedy = "the disk is full", "Make room, or choose another folder, and start again."
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS) or "os error 13" in str(error):
        reason, remedy = "this user may not write there", "Get write access, or choose another folder, and start again."
    elif code == errno.ENOENT or "os error 2)" in str(error):
        reason, remedy = "the folder is gone", "Put it back, or choose another folder, and start again."
    else:
        reason, remedy = "the system refused it", "Mend that, or choose another folder, and start again."
    return f"`{path}` could not be written ({error}): {reason}. Files written before are untouched. {remedy}"


def read_tensor_file(path: Path, *, remedy: str) -> tuple[TensorDict, dict[str, str]]:
    """Returns the tensors, in host memory, and the texts of a file that `write_tensor_file` wrote.

    Args:
        path: the file.
        remedy: what to do if it is damaged, the last sentence of the message.

    Raises:
        CheckpointError: if the file is missing, truncated or altered, or is of another origin.
    """
    # Opened, a pipe would be waited for.
    if path.exists() and not path.is_file():
        raise CheckpointError(f"`{path}` is no regular file, so it holds no tensors: it was put there. {remedy}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            texts = dict(file.metadata() or {})
            # Copied into memory that torch aligns: some kernels round differently on other addresses, and a resumed run
            # must agree bit for bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"`{path}` cannot be read ({error}): it is missing, incomplete or damaged. {remedy}"
        ) from error
    checksum = texts.pop(_CHECKSUM, None)
    if checksum is None:
        raise CheckpointError(f"`{path}` holds no checksum: it was not written by hypertorch. {remedy}")
    if checksum != _checksum(tensors, texts):
        raise CheckpointError(f"`{path}` does not match its checksum: its content was altered or damaged. {remedy}")
    return tensors, texts


def tensor_checksum(value: Tensor, start: int = 0) -> int:
    """Returns a checksum of the bytes of a tensor, from any device, that goes on from another checksum."""
    return zlib.crc32(_bytes(value.detach().to("cpu").contiguous()), start)


def _on_host(tensors: TensorMapping) -> TensorDict:
    """Returns contiguous copies in host memory that do not overlap, as the format demands."""
    on_host: TensorDict = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        copy = value.detach().to("cpu").contiguous()
        # Tied parameters share a storage, which the format refuses.
        storage = copy.untyped_storage().data_ptr()
        on_host[name] = copy.clone() if storage in seen else copy
        seen.add(storage)
    return on_host


def _checksum(tensors: TensorMapping, texts: Mapping[str, str]) -> str:
    total = 0
    for name in sorted(texts):
        total = zlib.crc32(f"{name}={texts[name]}".encode(), total)
    # Sorted, because the format keeps no order; with type and shape, because bytes alone do not tell them.
    for name in sorted(tensors):
        value = tensors[name]
        total = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        total = tensor_checksum(value, total)
    return f"{total:08x}"


def _bytes(value: Tensor) -> memoryview:
    # Through uint8, since numpy has no bfloat16; a view, since a copy would double the memory of a large model.
    return value.reshape(-1).view(torch.uint8).numpy().data


def _flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of files, would survive a power failure."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
