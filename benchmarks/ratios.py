"""The ratios to be reached, and what was reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.row import Row
from benchmarks.work import Target

PEERS, BYTES = "peers", "bytes"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A target with its measured figure.

    Attributes:
        work: name of the work or sweep.
        title: what is computed.
        size: the swept size; None outside a sweep.
        target: what was wanted.
        against: what it is compared with, the best peer by its name.
        figure: the ratio, or the bytes; None if not measured.
        reached: whether it is at most what was wanted, of a hypergradient that agrees; None if not measured.
        notes: why it was not measured, or does not count.
    """

    work: str
    title: str
    size: int | None
    target: Target
    against: str
    figure: float | None
    reached: bool | None
    notes: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns the ratio for JSON and CSV."""
        own = {name: value for name, value in asdict(self).items() if name != "target"}
        return {**own, **{name: getattr(self.target, name) for name in ("contestant", "quantity", "at_most")}}


def measured_ratio(target: Target, rows: Sequence[Row]) -> Ratio:
    """Returns what was reached of a target; nothing is, by or against a contestant whose hypergradient disagrees.

    Args:
        target: what was wanted.
        rows: of all contestants on the work, at one size.
    """
    own = next((row for row in rows if row.contestant == target.contestant), None)
    base, against = _base(target, rows)
    value = None if own is None else own.quantity(target.quantity)
    figure = None if value is None or base is None or base <= 0 else value / base
    some = rows[0]
    wrong = [row for row in rows if row.agrees is False and row.contestant in (target.contestant, against)]
    return Ratio(
        work=some.work,
        title=some.title,
        size=some.size,
        target=target,
        against=against,
        figure=figure,
        reached=None if figure is None else figure <= target.at_most and not wrong,
        notes="; ".join(
            _missing(target.contestant if value is None else against, rows)
            if figure is None
            else [_disagreement(row) for row in wrong]
        ),
    )


def _missing(name: str, rows: Sequence[Row]) -> list[str]:
    """Returns what is missing for a figure, with the reasons."""
    reasons = [note for row in rows if row.contestant == name for note in row.notes]
    if name == PEERS:
        reasons += [_disagreement(row) for row in rows if row.side == "peer" and row.agrees is False]
    return [name, *reasons]


def _disagreement(row: Row) -> str:
    error = "" if row.error is None else f", relative error {row.error:.1e}"
    return f"{row.contestant} disagrees with {row.reference}{error}"


def _base(target: Target, rows: Sequence[Row]) -> tuple[float | None, str]:
    """Returns what the figure is divided by, and what that is."""
    if target.against == BYTES:
        return 1.0, BYTES
    if target.against == PEERS:
        peers = [row for row in rows if row.side == "peer" and row.agrees is not False]
        figures = {row.contestant: row.quantity(target.quantity) for row in peers}
        measured = {name: value for name, value in figures.items() if value is not None}
        best = min(measured, key=lambda name: measured[name], default=None)
        return (None, PEERS) if best is None else (measured[best], best)
    named = [row for row in rows if row.contestant == target.against]
    if named:
        return named[0].quantity(target.quantity), target.against
    own = [row for row in rows if row.contestant == target.contestant]
    return (own[0].quantity(target.against) if own else None), target.against
