"""Kept states in a file: what reverse mode keeps of a run, where it does not fit into memory."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from hypertorch.autodiff.live_memory import format_bytes
from hypertorch.inner.state import InnerState


class SpilledStates:
    """A stack of inner states of which the last is in memory, and those below it are in a file.

    A run keeps states going forward and asks for them back from the last to the first, so that the next one to be read
    is always known: one thread writes it while the run goes on, and reads it back while the segment behind it is
    differentiated. What comes back has the bits, dtypes, strides and devices of what was kept; what an expanded tensor
    repeats comes back as often as it is repeated.

    The file has no name (where the system can do that), so that nothing is left behind however the process ends. Its
    room is taken when the first state is kept. It is read and written, and not mapped: its pages are the system's
    cache, which gives way when memory is short, and a fault of the disk is an exception.

    Memory: the last state, and the one that is being written or read.

    Args:
        folder: where the file lies. One in memory (`/dev/shm`) keeps states of an accelerator on the host; what moves
            between them goes through pinned memory.
        most: states kept at once.

    Raises:
        OSError: if the folder has no room for `most - 1` states as large as the first, or the file cannot be written or
            read.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._most = most
        self._below: list[_Place] = []
        self._top: InnerState | _Reading | None = None
        self._top_place: _Place | None = None
        self._pending: Future[None] | None = None

    def __enter__(self) -> SpilledStates:
        # Unbuffered: states are large, and another buffer would be a copy.
        try:
            self._file = cast(FileIO, tempfile.TemporaryFile(dir=self._folder, buffering=0))
        except OSError as error:
            raise OSError(
                error.errno,
                f"`spill_to` is '{self._folder}', where no file can be made ({error.strerror}): the kept states have "
                "nowhere to lie. Pass a folder that you may write to.",
            ) from error
        # One thread, which alone touches the file: what it is asked for is done in order.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hypertorch-spill")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._thread.shutdown(wait=True, cancel_futures=True)
        finally:  # also where a second interrupt ends the waiting
            self._file.close()
        self._top = self._top_place = self._pending = None
        self._below.clear()

    def __len__(self) -> int:
        return len(self._below) + (self._top is not None)

    def append(self, state: InnerState) -> None:
        """Keeps a state; the last one before it goes into the file."""
        if self._top is None:
            self._take_room(state)
        elif self._top_place is not None:  # where it was read from it still lies
            self._below.append(self._top_place)
        else:
            self._write(self[-1])
        self._top, self._top_place = state, None

    def __getitem__(self, position: int) -> InnerState:
        """Returns the last state; no other can be asked for."""
        if position != -1 or self._top is None:
            raise IndexError(f"position {position} of {len(self)} kept states: only the last one, -1, is in memory.")
        if isinstance(self._top, _Reading):
            self._wait()
            self._top = self._top.finished()
        return self._top

    def pop(self) -> InnerState:
        """Returns the last state and keeps it no longer; the one below it is read meanwhile."""
        last = self[-1]
        self._top = self._top_place = None
        if self._below:
            # So that no state is held twice, being written and being read.
            self._wait()
            self._top_place = place = self._below.pop()
            self._top = _Reading(place, place.room())
            views = [_bytes_of(value) for value in self._top.host]
            self._pending = self._thread.submit(self._read_all, place.start, views)
        return last

    def _write(self, state: InnerState) -> None:
        host = [_on_host(value.detach()) for value in state.tensors()]
        start = self._below[-1].stop if self._below else 0
        layouts = tuple(_Layout.of(*pair) for pair in zip(host, state.tensors(), strict=True))
        if self._below and self._below[-1].layouts == layouts:
            layouts = self._below[-1].layouts
        stop = start + sum(value.nbytes for value in host)
        # One state on its way at a time: what waits in a queue is in memory.
        self._wait()
        device = next((value.device for value in state.tensors() if value.device.type != "cpu"), None)
        self._pending = self._thread.submit(self._write_all, start, [_bytes_of(value) for value in host], device)
        self._below.append(_Place(start, stop, layouts, [*state.params], [*state.dynamics]))

    def _take_room(self, state: InnerState) -> None:
        """Makes the file as large as it will be, if all states are as large as this one."""
        size = sum(value.numel() * value.element_size() for value in state.tensors())
        needed = (self._most - 1) * size
        # Of the file where that can be asked: its folder may be gone, which does it no harm.
        free = shutil.disk_usage(self._file.fileno() if hasattr(os, "fstatvfs") else self._folder).free
        try:
            if needed > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if needed and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, needed)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that takes room as it is written
                return
            raise OSError(
                error.errno,
                f"`spill_to` is '{self._folder}', where {free} bytes ({format_bytes(free)}) are free: {self._most - 1} "
                f"states of {format_bytes(size)} need {needed} bytes ({format_bytes(needed)}) there. Make room, choose "
                "a folder on a larger disk, or keep fewer states: a larger `checkpoint_every` or `memory_budget`, or "
                "fewer `snapshots`.",
            ) from error

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            raise OSError(
                error.errno,
                f"`spill_to` is '{self._folder}', and kept states could not be written there or read back "
                f"({error.strerror}): the derivative cannot be computed. Mend that disk, or choose another folder.",
            ) from error

    # In the thread.

    def _write_all(self, start: int, views: list[memoryview], device: torch.device | None) -> None:
        if device is not None:
            # Until the copies to the host are done, which nobody else waits for.
            torch.accelerator.synchronize(device)
        self._file.seek(start)
        while views:
            view = views.pop(0)
            while view:
                view = view[self._file.write(view) :]

    def _read_all(self, start: int, views: list[memoryview]) -> None:
        self._file.seek(start)
        while views:
            view = views.pop(0)
            while view:
                read = self._file.readinto(view)
                if not read:
                    raise OSError(errno.EIO, "the file is shorter than what was written to it")
                view = view[read:]


KeptStates: TypeAlias = "list[InnerState] | SpilledStates"
"""A stack of states: in memory, or in a file."""


def kept_states(spill_to: Path | None, most: int) -> AbstractContextManager[KeptStates]:
    """Returns an empty stack of states.

    Args:
        spill_to: the folder of the file; None to keep states in memory.
        most: states kept at once.
    """
    return nullcontext([]) if spill_to is None else SpilledStates(spill_to, most)


class _Layout(NamedTuple):
    """How a tensor lies in memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, host: Tensor, value: Tensor) -> _Layout:
        return cls(host.shape, host.stride(), host.dtype, value.device)


class _Place(NamedTuple):
    """Where a state lies in the file, and what it is made of."""

    start: int
    stop: int
    layouts: tuple[_Layout, ...]
    params: list[str]
    dynamics: list[str]

    def room(self) -> list[Tensor]:
        """Returns tensors on the host to read the state into."""
        return [
            torch.empty_strided(shape, stride, dtype=dtype, pin_memory=device.type != "cpu")
            for shape, stride, dtype, device in self.layouts
        ]


class _Reading(NamedTuple):
    """A state that is being read."""

    place: _Place
    host: list[Tensor]

    def finished(self) -> InnerState:
        """Returns the state, on its devices."""
        values = [
            value.to(layout.device, non_blocking=True)
            for value, layout in zip(self.host, self.place.layouts, strict=True)
        ]
        split = len(self.place.params)
        return InnerState(
            dict(zip(self.place.params, values[:split], strict=True)),
            dict(zip(self.place.dynamics, values[split:], strict=True)),
        )


def _on_host(value: Tensor) -> Tensor:
    """Returns the tensor itself where its memory can be written to a file as it is, else a copy for which that holds.

    A copy from an accelerator is under way when this returns.
    """
    value = value.resolve_conj().resolve_neg()
    if value.device.type == "cpu":
        # `clone` closes gaps and keeps the order of axes: strides choose kernels, and with them the last bit.
        return value if _is_dense(value) else value.clone()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)


def _is_dense(value: Tensor) -> bool:
    """Returns whether the tensor's entries lie side by side, in some order of its axes."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _bytes_of(value: Tensor) -> memoryview:
    return value.as_strided((value.numel(),), (1,)).view(torch.uint8).numpy().data
