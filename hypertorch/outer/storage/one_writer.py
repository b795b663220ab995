"""One writer for each folder: two runs that write into the same one would mix."""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hypertorch.errors import CheckpointError
from hypertorch.outer.storage.tensor_files import not_written

_LOCK = ".lock"
_WRITER = ".writer.json"
# Beginnings of the names of network file systems in Linux's list of mounts.
_SHARED = (
    "nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "beegfs", "glusterfs", "afs", "pvfs", "orangefs", "wekafs",
    "fuse.", "9p", "panfs", "vast",
)  # fmt: skip
# A process writes its name right after it has the lock.
_LOOKS, _PAUSE = 10, 0.05  # seconds


@contextmanager
def one_writer(folder: Path, file: str = "") -> Iterator[None]:
    """Keeps every other process, and every other run of this one, from writing into a folder meanwhile.

    The operating system holds the lock for the process, so that it ends with it however the process ends. On a file
    system that machines share it may not reach from one to another. There a writer of another machine that did not say
    that it ended is taken to be alive.

    Cost: a file is opened once, and a short one written.

    Args:
        folder: the folder; made if it is not there.
        file: name of the one file in it that is written; the rest of the folder stays free.

    Raises:
        CheckpointError: if another run writes there, or may do so, with its process and host; or if nothing can be
            written there.
    """
    lock = FileLock(folder / f"{file}{_LOCK}", timeout=0, thread_local=False)
    owner = folder / f"{file}{_WRITER}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"`{folder / file}` is being written by {_writer(owner)}: two runs in one place would mix. Wait for it or "
            "end it, or choose another place."
        ) from None
    except OSError as error:
        raise CheckpointError(not_written(folder, error)) from error
    try:
        if is_shared_with_machines(folder):
            _refuse_other_machine(owner)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        writer = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        # A dead process's of this machine is replaced here. A pipe in its place would be waited for.
        owner.unlink(missing_ok=True)
        owner.write_text(json.dumps(writer), encoding="utf-8")
        try:
            yield
        finally:
            # A folder that is gone, or a full disk, must not hide what the run ended with.
            with suppress(OSError):
                owner.write_text(json.dumps({**writer, "ended": True}), encoding="utf-8")
    finally:
        lock.release()


def is_shared_with_machines(folder: Path) -> bool:
    """Returns whether a folder lies on a file system that several machines share; False where that is not known."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return False
    place, deepest, kind = folder.resolve(), 0, ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        # Blanks in a path are written as octal numbers.
        mounted = Path(before.split()[4].replace("\\040", " "))
        # Of two at one place the later one is seen.
        if place.is_relative_to(mounted) and len(mounted.parts) >= deepest:
            deepest, kind = len(mounted.parts), after.split()[0]
    return kind.startswith(_SHARED)


def _refuse_other_machine(owner: Path) -> None:
    """Raises if the last writer was on another machine, and did not take its name away when it ended."""
    found = _read(owner)
    if found is None or found["ended"] or found["host"] == socket.gethostname():
        return
    raise CheckpointError(
        f"`{owner.parent}` was last written by {_described(found)}, which did not say that it ended. Locks do not "
        "reach from machine to machine on every shared file system, so it may be alive: two runs in one place would "
        f"mix. End it; if it is gone, delete `{owner}` and start again."
    )


def _writer(owner: Path) -> str:
    """Returns who holds the lock, in words."""
    for attempt in range(_LOOKS):
        if attempt:
            time.sleep(_PAUSE)
        found = _read(owner)
        # One that ended or was killed left its name: who holds the lock now is about to write its own.
        if found is not None and not found["ended"] and not _is_gone(found):
            return _described(found)
    return "another process"


def _described(writer: dict[str, Any]) -> str:
    return f"process {writer['pid']} on {writer['host'][:80]!r} since {writer['since'][:30]}"


def _read(owner: Path) -> dict[str, Any] | None:
    """Returns who wrote last, by `pid`, `host` and `since`, and whether it `ended`; None if that is not known."""
    try:
        # A pipe in its place would be waited for, and a device never ends.
        if not owner.is_file():
            return None
        writer = json.loads(owner.read_text(encoding="utf-8"))
        ended = writer.get("ended") is True
        return {"pid": int(writer["pid"]), "host": str(writer["host"]), "since": str(writer["since"]), "ended": ended}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _is_gone(writer: dict[str, Any]) -> bool:
    """Returns whether a writer is a process of this machine that is no more; False where that cannot be asked."""
    pid = writer["pid"]
    if os.name != "posix" or pid <= 0 or writer["host"] != socket.gethostname():  # elsewhere this signal is no question
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
