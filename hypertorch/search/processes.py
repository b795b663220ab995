"""Which process works on a trial, and whether it still lives."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from optuna.storages import BaseStorage

_PREFIX = "process "
_BEAT = 10.0  # seconds between two signs of life
_GRACE = 60.0  # seconds without one after which a process of another machine counts as dead


class Process:
    """This process, as the others that share a study see it; a context within which it counts as alive.

    A process of the same machine is looked for there, and known to be dead at once. One of another machine gives a sign
    of life every 10 seconds, and counts as dead after 60 without; the clocks of the machines must agree better than
    that.

    Args:
        storage: of the study.
        study_id: of the study in the storage.
    """

    def __init__(self, storage: BaseStorage, study_id: int) -> None:
        self._storage = storage
        self._study_id = study_id
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.name = " ".join((_machine(), str(os.getpid()), str(_started(os.getpid())), uuid.uuid4().hex[:8]))

    def __enter__(self) -> Process:
        self._write(time.time())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        # No moment: this process said that it ended.
        self._write(0.0)

    def is_alive(self, name: str) -> bool:
        """Returns whether a process is at work.

        Args:
            name: of the process.
        """
        last = self._storage.get_study_user_attrs(self._study_id).get(_PREFIX + name, 0.0)
        if last == 0.0:  # it said that it ended
            return False
        machine, process, started, _ = name.rsplit(" ", 3)
        if machine == _machine():
            return _exists(int(process)) and str(_started(int(process))) == started
        return time.time() - last < _GRACE

    def others(self) -> list[str]:
        """Returns the names of the other processes that are at work on the study."""
        return [name for name in self._names() if name != self.name and self.is_alive(name)]

    def is_first(self) -> bool:
        """Returns whether no other process has been at work on the study."""
        return self._names() == [self.name]

    def _names(self) -> list[str]:
        found = self._storage.get_study_user_attrs(self._study_id)
        return [key.removeprefix(_PREFIX) for key in found if key.startswith(_PREFIX)]

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            self._write(time.time())

    def _write(self, moment: float) -> None:
        self._storage.set_study_user_attr(self._study_id, _PREFIX + self.name, moment)


def _machine() -> str:
    """Returns the name of the machine; of containers on one machine, each is one of its own."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space.readlink() if space.is_symlink() else ''}"


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _started(process: int) -> str:
    """Returns when a process began, in the kernel's ticks, since numbers are used again; "" where that is not said."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]
