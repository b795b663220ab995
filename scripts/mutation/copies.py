"""Copies of the checkout, so that no error is ever put into the checkout itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

_times = count(1)


def tracked(root: Path) -> list[str]:
    """Returns the files of a checkout: those that git knows and those that it does not ignore."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(name for name in set(names) if (root / name).is_file())


def copy_checkout(root: Path, target: Path) -> Path:
    """Copies the files of a checkout to a new folder, and returns the folder."""
    for name in tracked(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
    return target


@contextmanager
def changed(file: Path, code: str) -> Iterator[None]:
    """Gives a file of a copy another content for a while."""
    old, status = file.read_bytes(), file.stat()
    try:
        file.write_text(code)
        # Python knows compiled files by the source's size and second: without this it would run those of another error.
        later = status.st_mtime + next(_times)
        os.utime(file, (later, later))
        yield
    finally:
        file.write_bytes(old)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
