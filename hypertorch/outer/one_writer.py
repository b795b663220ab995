"""One writer for each folder: two runs that write into the same one would mix."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hypertorch.errors import CheckpointError
from hypertorch.outer.tensor_files import not_written

_LOCK = ".lock"
_WRITER = ".writer.json"


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
        # A pipe in its place would be waited for.
        owner.unlink(missing_ok=True)
        owner.write_text(json.dumps(writer), encoding="utf-8")
        yield
    finally:
        lock.release()


def _writer(owner: Path) -> str:
    try:
        writer = json.loads(owner.read_text(encoding="utf-8"))
        return f"process {int(writer['pid'])} on {str(writer['host'])[:80]!r} since {str(writer['since'])[:30]}"
    # The other process may be about to write it.
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
