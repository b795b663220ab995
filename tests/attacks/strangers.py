"""Code of a stranger, that leaves a file where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Touch:
    """Writes a file when it is read back from a pickle."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._path, "the code of a stranger ran")
