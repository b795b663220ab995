"""One line of the results: a contestant on a work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.contestant import Side


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a contestant; what could not be is None, with the reason in `notes`.

    Attributes:
        work: name of the work or sweep.
        title: what is computed.
        size: the swept size; None outside a sweep.
        contestant: name of the contestant.
        library: whose it is.
        side: on which side it stands.
        median_seconds: median over the repetitions.
        min_seconds: the fastest repetition.
        lower_quartile_seconds: of the repetitions.
        upper_quartile_seconds: of the repetitions.
        first_seconds: the first run of a process that finds no compiled program: with compilation, where there is one.
        second_process_seconds: the first run of a second process, which finds what the first one compiled; None of what
            does not compile.
        repetitions: timed runs.
        peak_bytes: peak memory above what was in use before, in a process of its own.
        operations: calls of PyTorch's dispatcher in a run; None of what runs compiled programs.
        moved_bytes: that those calls read and write.
        error: relative error of the hypergradient against the work's reference.
        error_in_float64: the same in float64, where the other is beyond the tolerance; None elsewhere.
        reference: whose hypergradient that is.
        agrees: whether one of the two is within the tolerance; None for the floor.
        figures: what the contestant counted itself.
        commit: of the code, with "+" if files differed from it; None outside git, and in older results.
        load_average: mean number of running processes, this benchmark's own included, over the last minute of
            measuring the work; None where the system does not say, and in older results.
        notes: why something was not measured.
    """

    work: str
    title: str
    size: int | None
    contestant: str
    library: str
    side: Side
    median_seconds: float | None = None
    min_seconds: float | None = None
    lower_quartile_seconds: float | None = None
    upper_quartile_seconds: float | None = None
    first_seconds: float | None = None
    second_process_seconds: float | None = None
    repetitions: int = 0
    peak_bytes: int | None = None
    operations: int | None = None
    moved_bytes: int | None = None
    error: float | None = None
    error_in_float64: float | None = None
    reference: str | None = None
    agrees: bool | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    commit: str | None = None
    load_average: float | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the row for JSON."""
        return {**asdict(self), "figures": dict(self.figures), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Returns the row that `as_dict` wrote."""
        return cls(**{**values, "notes": tuple(values["notes"])})

    def flat(self) -> dict[str, Any]:
        """Returns the row for CSV: figures in columns of their own, notes in one."""
        rest = {name: value for name, value in self.as_dict().items() if name not in ("figures", "notes")}
        return {**rest, **self.figures, "notes": "; ".join(self.notes)}

    def quantity(self, name: str) -> float | None:
        """Returns "time" (the fastest repetition), "memory", or a figure of the contestant's own by its name."""
        known: dict[str, float | None] = {"time": self.min_seconds, "memory": self.peak_bytes}
        return known[name] if name in known else self.figures.get(name)
