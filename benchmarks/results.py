"""What a benchmark has measured so far, what follows from it, and the files that hold it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import variants
from benchmarks.charts import plot_sweep
from benchmarks.ratios import Ratio, measured_ratio
from benchmarks.row import Row
from benchmarks.sweep import Growth, crossover, growth
from benchmarks.tables import ratio_lines
from benchmarks.work import Work
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.results.reporting import json_ready, write_csv, write_results
from experiments.common.runs.run_folder import read_text

# What must be the same for numbers to stand in one table.
_COMPARABLE = ("versions", "machine")
_CHANGING = ("load_average",)
_LARGEST = 2**24  # bytes of a results.json; a whole benchmark writes a fiftieth of it
_REMEDY = "Restore the file, or delete it to measure everything anew in its folder."


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A work over one of its sizes.

    Args:
        axis: what grows, in words.
        by_size: the work at every size, ascending.
    """

    axis: str
    by_size: Mapping[int, Work]

    @property
    def works(self) -> tuple[Work, ...]:
        """The works, by ascending size."""
        return tuple(self.by_size.values())


@dataclass(kw_only=True)
class Results:
    """What was measured so far: its rows; ratios, exponents and charts follow from them.

    Args:
        folder: where they are written.
        header: what determines the numbers.
        works: by name.
        sweeps: by name.
        chosen: names of the works and sweeps to measure; what else an earlier part of the benchmark has measured stays.
        rows: what was measured.
    """

    folder: Path
    header: Mapping[str, Any]
    works: Mapping[str, Work]
    sweeps: Mapping[str, Sweep]
    chosen: Collection[str]
    rows: list[Row] = field(default_factory=list)

    def missing(self) -> Iterator[tuple[str, int | None, Work]]:
        """Yields name, size (None outside a sweep) and work of what is still to be measured: works, then sweeps."""
        done = {(row.work, row.size) for row in self.rows}
        every = [(name, None, work) for name, work in self.works.items()]
        every += [(name, size, work) for name, sweep in self.sweeps.items() for size, work in sweep.by_size.items()]
        yield from (item for item in every if item[0] in self.chosen and item[:2] not in done)

    def add(self, rows: Sequence[Row], path: Path) -> None:
        """Takes the rows of a work, and writes everything anew: what interrupts a benchmark loses one work at most."""
        self.rows.extend(rows)
        self.write(path)

    def go_on_from(self, path: Path) -> None:
        """Takes what an interrupted benchmark has measured.

        Args:
            path: of its results.json.

        Raises:
            ExpectedFailure: if it is damaged, or was measured on another machine, or with other versions.
        """
        before, rows = _read(path, self.header)
        for key in _COMPARABLE:
            then, now = (_lasting(part[key]) for part in (before, json_ready(self.header)))
            if then != now:
                raise ExpectedFailure(
                    f"`resume` is True, but {str(path)!r} was measured with other {key} ({then}) than those of now "
                    f"({now}): the numbers could not be compared. Start anew, without resume=true."
                )
        self.header = {name: before[name] for name in self.header}
        self.rows.extend(rows)

    def ratios(self) -> list[Ratio]:
        """Returns the targets of what was measured, with what was reached."""
        found = [
            measured_ratio(target, rows)
            for name, work in self.works.items()
            if (rows := self._rows_of(name, None))
            for target in work.targets()
        ]
        return found + [
            measured_ratio(target, rows)
            for name, sweep in self.sweeps.items()
            if self._compares_modes(name)
            for size, work in sweep.by_size.items()
            if (rows := self._rows_of(name, size))
            for target in work.targets()
        ]

    def measured_sweeps(self) -> list[str]:
        """Returns the names of the sweeps of which something was measured."""
        return [name for name in self.sweeps if any(row.work == name for row in self.rows)]

    def exponents(self, name: str) -> dict[str, dict[str, Growth | None]]:
        """Returns how time and memory of every contestant grow along a sweep."""
        rows = [row for row in self.rows if row.work == name]
        return {
            key: {
                quantity: growth([row for row in rows if row.contestant == key], quantity)
                for quantity in ("time", "memory")
            }
            for key in dict.fromkeys(row.contestant for row in rows)
        }

    def write(self, path: Path) -> None:
        """Writes results.json, the rows and ratios as CSV, and the ratios as a table.

        Args:
            path: of results.json.
        """
        ratios = self.ratios()
        write_csv(self.folder / "rows.csv", [row.flat() for row in self.rows])
        write_csv(self.folder / "ratios.csv", [ratio.as_dict() for ratio in ratios])
        (self.folder / "ratios.md").write_text("\n".join(ratio_lines(ratios)) + "\n", encoding="utf-8")
        measured = {
            "rows": [json_ready(row.as_dict()) for row in self.rows],
            "ratios": [json_ready(ratio.as_dict()) for ratio in ratios],
            "sweeps": {name: self._summary(name) for name in self.measured_sweeps()},
        }
        write_results(path, {**self.header, **measured})

    def draw(self) -> None:
        """Draws a chart of time and memory for every sweep."""
        for name in self.measured_sweeps():
            sweep, rows = self.sweeps[name], [row for row in self.rows if row.work == name]
            targets = {size: work.targets() for size, work in sweep.by_size.items()}
            plot_sweep(rows, self.exponents(name), targets, axis=sweep.axis, path=self.folder / f"{name}.png")

    def _rows_of(self, name: str, size: int | None) -> list[Row]:
        return [row for row in self.rows if (row.work, row.size) == (name, size)]

    def _compares_modes(self, name: str) -> bool:
        return any(row.work == name and row.contestant == variants.FORWARD for row in self.rows)

    def _summary(self, name: str) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "axis": self.sweeps[name].axis,
            "exponents": {
                key: {quantity: None if fit is None else asdict(fit) for quantity, fit in found.items()}
                for key, found in self.exponents(name).items()
            },
        }
        if self._compares_modes(name):
            rows = [row for row in self.rows if row.work == name]
            summary["forward_crosses_reverse_at"] = crossover(rows, variants.FORWARD, variants.EAGER)
        return summary


def _read(path: Path, header: Mapping[str, Any]) -> tuple[dict[str, Any], list[Row]]:
    """Returns what a results.json holds, with a header like the given one, and its rows."""
    try:
        held = json.loads(read_text(path, largest=_LARGEST, remedy=_REMEDY))
        rows = [Row.from_dict(row) for row in held["rows"]]
        wrong = [key for key, value in header.items() if type(held[key]) is not type(value)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        if not wrong:
            return held, rows
        problem = f"{wrong[0]} is {held[wrong[0]]!r}"
    raise ExpectedFailure(
        f"`resume` is True, but {str(path)!r} is not as a benchmark writes it ({problem}): what was measured cannot be "
        f"taken from it. {_REMEDY}"
    )


def _lasting(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in _CHANGING}
