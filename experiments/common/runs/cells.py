"""Cells of a table: training commands that are run once, gone on with if they were interrupted, and then only read."""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import as_given, optional, package_names, switch, text
from experiments.common.configuration.typed_settings import setting
from experiments.common.runs.run_folder import RunFolder, read_config, read_results

_TRAIN = Path(__file__).resolve().parents[2] / "train.py"
# Settings of a training command that say where and how it runs, not what is computed.
_FREE = (
    *("paths.", "resume=", "device=", "threads=", "dataset.root=", "experiment.root="),
    *("outer_loop.progress=", "pictures.", "hydra."),
)
# As in scripts/train, where it is explained.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


@dataclass(frozen=True, kw_only=True)
class CellSettings:
    """What every command that runs cells reads.

    Args:
        data: folder of the data sets; None where nothing is run.
        cells: folder of the cells' runs.
        trust: packages whose classes the runs that are there may name.
        run: whether what is missing is run.
        overrides: further settings of every cell.
        resume: nothing beside the cells is resumed.
    """

    data: str | None = setting(optional(text))
    cells: str = setting(text)
    trust: list[str] = setting(package_names)
    run: bool = setting(switch)
    overrides: list[str] = setting(as_given)
    resume: bool = setting(switch)

    def check_data(self, needed: Sequence[str]) -> None:
        """Refuses to run without the data sets.

        Args:
            needed: names of the folders in `data`.

        Raises:
            ExpectedFailure: if `data` is not given, or is no folder.
        """
        folders = " and ".join(f"`{name}`" for name in needed)
        if not self.run or not needed:
            return
        if self.data is None:
            raise ExpectedFailure(
                "`data` is not given, so there is nothing to train on. Pass data=... the folder that has "
                f"{folders}, or run=false to write the table of what was run."
            )
        if not Path(self.data).is_dir():
            raise ExpectedFailure(
                f"`data` is {self.data!r}, which is no folder: there is nothing to train on. Pass the folder that "
                f"has {folders}."
            )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training command of a table, in a folder of its own.

    Args:
        name: for messages.
        overrides: settings of the training command.
        folder: where its run is.
    """

    name: str
    overrides: tuple[str, ...]
    folder: RunFolder

    def is_finished(self) -> bool:
        """Returns whether the cell has its figures."""
        return self.folder.results.is_file()

    def check_folder(self, trusted: Sequence[str]) -> None:
        """Refuses a folder whose configuration names classes that a run's folder may not name.

        Args:
            trusted: packages whose classes it may name too.

        Raises:
            ExpectedFailure: naming them.
        """
        if self.folder.config.exists():
            read_config(self.folder.path, setting="cells", trusted=trusted)

    def check_command(self) -> None:
        """Refuses figures of other settings than those that the cell is to have.

        Raises:
            ExpectedFailure: naming the settings that only one of the two commands has.
        """
        recorded = self.read().get("command")
        if recorded is None:
            return
        was, wanted = _settings(shlex.split(recorded)[1:]), _settings(self.overrides)
        if was != wanted:
            raise ExpectedFailure(
                f"`cells` has a finished run of {self.name} that was made by another command: {sorted(was - wanted)} "
                f"there, {sorted(wanted - was)} here, so its figures are not those asked for. Give another folder with "
                f"cells=..., or delete {str(self.folder.path)!r}, or add run=false for the table of what was run."
            )

    def run(self, failures: Failures, data: str | None) -> None:
        """Trains and evaluates, or goes on with a run that was interrupted.

        Args:
            failures: of the command that has the table.
            data: the folder of data sets; None where the training command needs none.

        Raises:
            ExpectedFailure: if the training command failed; it has said why.
        """
        begun = self.folder.config.is_file()
        words = [*self.overrides, f"paths.run_dir={self.folder.path}", *(["resume=true"] if begun else [])]
        own = {} if data is None else {"HYPERTORCH_DATA": data}
        done = subprocess.run(
            [sys.executable, str(_TRAIN), *words], check=False, env={**_KEEP_MEMORY, **failures.environment(), **own}
        )
        if done.returncode:
            raise ExpectedFailure(
                f"the cell {self.name} ended with exit code {done.returncode}: its message is above. The same command "
                "of the table goes on from here once that is mended."
            )

    def read(self) -> dict[str, Any]:
        """Returns the figures of a finished cell."""
        return read_results(self.folder.results)

    def command_that_ran(self, results: Mapping[str, Any], data: str | None) -> str | None:
        """Returns the command of the run itself, without where it lay; None if the run does not say.

        Args:
            results: the figures of the cell.
            data: the folder of data sets, which is shown as three dots.
        """
        if "command" not in results:
            return None
        words = [
            word.replace(str(Path(str(data)).resolve()), "...").replace(str(data), "...") if data else word
            for word in shlex.split(results["command"])
        ]
        return shlex.join(word for word in words if not word.startswith(("paths.", "resume=")))


CellT = TypeVar("CellT", bound=Cell)


def run_cells(
    cells: Sequence[CellT], settings: CellSettings, failures: Failures, console: Console, after: Callable[[CellT], None]
) -> None:
    """Runs the cells that have no figures yet, in order.

    Args:
        cells: the cells.
        settings: of the command that has the table.
        failures: of the same command.
        console: where the name of the cell that is run is shown.
        after: called with each cell that was run.

    Raises:
        ExpectedFailure: if a cell's folder is not as it is to be, or its training command failed.
    """
    for cell in cells:
        cell.check_folder(settings.trust)
    if not settings.run:
        return
    for cell in cells:
        if cell.is_finished():
            cell.check_command()
    for cell in cells:
        if not cell.is_finished():
            console.print(cell.name, highlight=False)
            cell.run(failures, None if settings.data is None else str(Path(settings.data).resolve()))
            after(cell)


def write_rows(folder: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Writes a table as table.csv and table.md.

    Args:
        folder: where to.
        columns: their headings, in order.
        rows: what stands under each heading.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _settings(words: Sequence[str]) -> set[str]:
    return {word for word in words if not word.lstrip("+~").startswith(_FREE)}
