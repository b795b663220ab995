"""The file of a study, one JSON object a line: an end that a dying process or a full disk tore off is cut."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

# How Optuna begins a line; what does not begin like this is another file, not a torn journal.
_BEGINNING = b'{"op_code":'

_log = logging.getLogger(__name__)


class BrokenJournalError(ValueError):
    """A journal has a line in its middle that is no record of a study, or one that does not fit."""


def open_journal(path: Path) -> JournalStorage:
    """Returns the storage in a file, after cutting a torn last line, on which Optuna would write the next one.

    Args:
        path: of the file; made if there is none.

    Raises:
        BrokenJournalError: if a line before the last is no record of a study, or nothing in the file is one.
        OSError: if the file cannot be used.
    """
    path = path.absolute()  # the lock is a link to it, and a relative one would point elsewhere
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with _locked(path):
            _cut(path)
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # of a record that lacks what belongs to it
        raise BrokenJournalError(
            f"`hydra.sweeper.storage` is the file {str(path)!r}, of which a record cannot be understood ({error!r}): "
            "none that follows can be trusted. Restore the file, or begin another study in another paths.sweep_dir."
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While no process of the study writes: Optuna takes this lock for each write."""
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _cut(path: Path) -> None:
    whole = 0
    with path.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            if _is_record(line):
                whole += len(line)
                continue
            is_torn = whole > 0 or line.startswith(_BEGINNING) or _BEGINNING.startswith(line)
            if file.read(1) or not is_torn:
                raise BrokenJournalError(
                    f"`hydra.sweeper.storage` is the file {str(path)!r}, whose line {number} is no record of a study: "
                    + (
                        "what follows it cannot be trusted. Restore the file, keep its lines before that one (`head -n "
                        f"{number - 1}`), which are the study until then, or begin another in another paths.sweep_dir."
                        if number > 1
                        else "it may be no study at all. Name another file, or another paths.sweep_dir."
                    )
                )
            file.truncate(whole)
            _log.warning("%s ended in a torn line, which was cut: line %d, %d bytes", path, number, len(line))
            return


def _is_record(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return False
    return isinstance(record, dict) and "op_code" in record
