"""The ratios to be reached, and what was reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments.benchmarks.row import Row
from experiments.benchmarks.work import Target

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
        reached: whether it is at most what was wanted; None if not measured.
        notes: why it was not measured.
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
    """Returns what was reached of a target.

    Args:
        target: what was wanted.
        rows: of all contestants on the work, at one size.
    """
    own = next((row for row in rows if row.contestant == target.contestant), None)
    base, against = _base(target, rows)
    value = None if own is None else own.quantity(target.quantity)
    figure = None if value is None or base is None or base <= 0 else value / base
    some = rows[0]
    missing = target.contestant if value is None else against
    reasons = [note for row in rows if row.contestant == missing for note in row.notes]
    return Ratio(
        work=some.work,
        title=some.title,
        size=some.size,
        target=target,
        against=against,
        figure=figure,
        reached=None if figure is None else figure <= target.at_most,
        notes="" if figure is not None else "; ".join([missing, *reasons]),
    )


def _base(target: Target, rows: Sequence[Row]) -> tuple[float | None, str]:
    """Returns what the figure is divided by, and what that is."""
    if target.against == BYTES:
        return 1.0, BYTES
    if target.against == PEERS:
        figures = {row.contestant: row.quantity(target.quantity) for row in rows if row.side == "peer"}
        measured = {name: value for name, value in figures.items() if value is not None}
        best = min(measured, key=lambda name: measured[name], default=None)
        return (None, PEERS) if best is None else (measured[best], best)
    named = [row for row in rows if row.contestant == target.against]
    if named:
        return named[0].quantity(target.quantity), target.against
    own = [row for row in rows if row.contestant == target.contestant]
    return (own[0].quantity(target.against) if own else None), target.against
