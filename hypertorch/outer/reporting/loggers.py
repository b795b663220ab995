"""Where the figures of an outer run go."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import checked_path
from hypertorch.errors import CheckpointError
from hypertorch.outer.storage.tensor_files import not_written
from hypertorch.types import TensorDict, TensorMapping


class Logger(ABC):
    """Receives the figures of an outer run. Subclass it to send them elsewhere."""

    @abstractmethod
    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Receives figures by name, after `step` outer steps; more than once per step if there is a validation."""

    def log_tensors(self, step: int, tensors: TensorMapping) -> None:  # noqa: B027 (most take numbers alone)
        """Receives tensors by name, after `step` outer steps, from `Snapshots`; does nothing unless overridden."""

    def log_pictures(self, step: int, pictures: TensorMapping) -> None:  # noqa: B027
        """Receives pictures by name, after `step` outer steps, from `Snapshots`; does nothing unless overridden.

        Args:
            step: outer steps done.
            pictures: each of shape `(1 or 3, height, width)`, entries from 0 to 1.
        """

    @abstractmethod
    def rewind(self, step: int) -> None:
        """Drops what was logged after `step` outer steps: the run resumes from there and will log it again."""

    @abstractmethod
    def close(self) -> None:
        """Writes pending figures and closes files. A later `log`, of a run that goes on, opens them again."""


class MemoryLogger(Logger):
    """Keeps the figures in a list, for plots and tests; and what `Snapshots` shows.

    Attributes:
        records: one dict per call of `log`: `step` and the figures.
        tensors: copies of tensors on the host, by step and name.
        pictures: copies of pictures on the host, by step and name.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []
        self.tensors: dict[int, TensorDict] = {}
        self.pictures: dict[int, TensorDict] = {}

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a record."""
        self.records.append({"step": step, **scalars})

    def log_tensors(self, step: int, tensors: TensorMapping) -> None:
        """Keeps copies."""
        self.tensors[step] = _copies(tensors)

    def log_pictures(self, step: int, pictures: TensorMapping) -> None:
        """Keeps copies."""
        self.pictures[step] = _copies(pictures)

    def rewind(self, step: int) -> None:
        """Removes what was logged after a step."""
        self.records = [record for record in self.records if record["step"] <= step]
        self.tensors = {at: tensors for at, tensors in self.tensors.items() if at <= step}
        self.pictures = {at: pictures for at, pictures in self.pictures.items() if at <= step}

    def close(self) -> None:
        """Does nothing: the records stay."""

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Returns the steps at which a figure was logged, and its values."""
        records = [record for record in self.records if name in record]
        return [record["step"] for record in records], [record[name] for record in records]


class JsonLinesLogger(Logger):
    """Appends one JSON object per record to a file, such as `{"step": 10, "outer_loss": 0.52}`.

    Every line goes to the operating system at once, so that a killed process loses none. A figure that is not finite is
    written as null, because JSON has no number for it.

    Args:
        path: the file; it and its folder are made when the first record comes, and an existing file is appended to.
    """

    @typed("path")
    def __init__(self, path: str | Path) -> None:
        self._path = checked_path("path", path)
        self._file: IO[str] | None = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line."""
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        # By default Python writes a bare `NaN`, which is no JSON and which other readers refuse.
        line = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
        with written_or_named(self._path):
            if self._file is None:
                self._check_is_regular()
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
            self._check_is_there()
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:
                # What is left in the buffer would fail again when the run closes the file.
                with suppress(OSError):
                    self.close()
                raise

    def _check_is_regular(self) -> None:
        """Raises if something else than a file has its name: a pipe would be waited for."""
        if self._path.exists() and not self._path.is_file():
            raise CheckpointError(
                f"`{self._path}` is no regular file, so it keeps no records: it was put there. Delete it, or choose "
                "another file."
            )

    def _check_is_there(self) -> None:
        """Raises if the file was deleted or replaced: the system would take lines that nobody can read."""
        try:
            is_there = self._file is not None and os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            is_there = False
        if not is_there:
            raise CheckpointError(
                f"`{self._path}` was deleted or replaced while the run wrote to it: its records are lost. Start the "
                "run again, in a folder that nothing else changes; if its checkpoints are there, by `resume=True`."
            )

    def rewind(self, step: int) -> None:
        """Removes the lines after a step, and lines that a killed process left unfinished."""
        self.close()
        with written_or_named(self._path):
            self._check_is_regular()
            if not self._path.exists():
                return
            # A killed process may leave half a line, in the middle of a character.
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _is_record_up_to(line, step)]
            if kept == lines:
                return
            # Replaced as a whole, so that a kill meanwhile loses no record.
            partial = self._path.with_name(self._path.name + ".partial")
            partial.unlink(missing_ok=True)
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(self._path)

    def close(self) -> None:
        """Closes the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


@contextmanager
def written_or_named(path: Path) -> Iterator[None]:
    """Turns an error of the system into one that names the file or folder, and why it could not be written."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise CheckpointError(not_written(path, error)) from error


def _copies(tensors: TensorMapping) -> TensorDict:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _is_record_up_to(line: str, step: int) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step
