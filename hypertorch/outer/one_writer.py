"""One writer for each folder: two runs that write into the same one would mix."""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hypertorch.errors import CheckpointError
from hypertorch.outer.tensor_files import not_written

_LOCK = ".lock"
_WRITER = ".writer.json"
# A process writes its name right after it has the lock.
_LOOKS, _PAUSE = 10, 0.05  # seconds


@contextmanager
def one_writer(folder: Path, file: str = "") -> Iterator[None]:
    """Keeps every other process, and every other run of this one, from writing into a folder meanwhile.

    The operating system holds the lock for the process, so that it ends with it however the process ends.

    Cost: a file is opened once, and a short one written.

    Args:
        folder: the folder; made if it is not there.
        file: name of the one file in it that is written; the rest of the folder stays free.

    Raises:
        CheckpointError: if another run writes there, with its process and host; or if nothing can be written there.
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
        now = datetime.datetime.now().isoformat(timespec="seconds")
        writer = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        # Only read where the lock is refused: a dead process's is replaced here.
        owner.write_text(json.dumps(writer), encoding="utf-8")
        yield
    finally:
        lock.release()


def _writer(owner: Path) -> str:
    """Returns who holds the lock, in words."""
    for attempt in range(_LOOKS):
        if attempt:
            time.sleep(_PAUSE)
        try:
            writer = json.loads(owner.read_text(encoding="utf-8"))
            pid, host, since = int(writer["pid"]), str(writer["host"]), str(writer["since"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
        # Killed, it left its name, and the one that holds the lock now is about to write its own.
        if not (host == socket.gethostname() and _is_gone(pid)):
            return f"process {pid} on {host[:80]!r} since {since[:30]}"
    return "another process"


def _is_gone(pid: int) -> bool:
    """Returns whether this machine has no such process; False where that cannot be asked."""
    if os.name != "posix" or pid <= 0:  # elsewhere this signal is no question
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
