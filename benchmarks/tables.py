"""Tables for the screen and for a README."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from benchmarks.ratios import BYTES, Ratio
from benchmarks.row import Row
from benchmarks.sweep import Growth

_MISSING = "-"
_DIGITS, _ALL_DIGITS = 3, 17
NOT_MEASURED = "not measured"


def table_of_rows(rows: Sequence[Row]) -> Table:
    """Returns times and errors on one work, one line per contestant.

    Args:
        rows: of one work at one size.
    """
    notes = [f"{row.contestant}: {'; '.join(row.notes)}" for row in rows if row.notes]
    table = Table(title=rows[0].title, title_justify="left", caption="\n".join(notes) or None, caption_justify="left")
    table.add_column("contestant")
    for column in ("median", "quartiles", "fastest", "x best peer", "error"):
        table.add_column(column, justify="right")
    agreeing = [row for row in rows if row.side == "peer" and row.agrees is not False]
    peers = [row.min_seconds for row in agreeing if row.min_seconds is not None]
    for row in rows:
        fastest = row.min_seconds
        table.add_row(
            row.contestant,
            time_words(row.median_seconds),
            _quartile_words(row),
            time_words(fastest),
            f"{fastest / min(peers):.3g}" if peers and fastest is not None else _MISSING,
            _error_words(row),
        )
    return table


def table_of_costs(rows: Sequence[Row]) -> Table:
    """Returns what the first runs and a run cost beside its time, one line per contestant.

    The first run is that of a process that finds no compiled program. Operations and the bytes that they move do not
    depend on the machine; they are those of PyTorch's dispatcher, which compiled programs do not ask.

    Args:
        rows: of one work at one size.
    """
    table = Table()
    table.add_column("contestant")
    for column in ("first run", "in a second process", "memory", "operations", "bytes moved"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.contestant,
            time_words(row.first_seconds),
            time_words(row.second_process_seconds),
            byte_words(row.peak_bytes),
            _MISSING if row.operations is None else f"{row.operations:,}",
            byte_words(row.moved_bytes),
        )
    return table


def table_of_growth(title: str, exponents: Mapping[str, Mapping[str, Growth | None]]) -> Table:
    """Returns the fitted exponents of a sweep.

    Args:
        title: the line above.
        exponents: by contestant and quantity.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("contestant")
    table.add_column("time grows as", justify="right")
    table.add_column("memory grows as", justify="right")
    for name, found in exponents.items():
        fits = (found["time"], found["memory"])
        table.add_row(name, *(_MISSING if fit is None else f"size^{fit.exponent:.2f}" for fit in fits))
    return table


def ratio_lines(ratios: Sequence[Ratio]) -> list[str]:
    """Returns the ratios as the lines of a Markdown table."""
    lines = ["| work | contestant | figure | against | wanted | measured | reached |", "|" + " --- |" * 7]
    for ratio in ratios:
        target = ratio.target
        words = byte_words if target.against == BYTES else _ratio_words
        wanted, measured, reached = words(target.at_most), NOT_MEASURED, ""
        if ratio.figure is not None:
            measured = _told_apart(ratio.figure, target.at_most, words)
            reached = "yes" if ratio.reached else "no"
        if ratio.notes:
            measured += f" ({ratio.notes})"
        size = "" if ratio.size is None else f" (size {ratio.size:,})"
        cells = (f"{ratio.title}{size}", target.contestant, target.quantity.replace("_", " "))
        cells += (ratio.against.replace("_", " "), f"at most {wanted}", measured, reached)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def time_words(seconds: float | None) -> str:
    """Returns a time for people, with three digits."""
    if seconds is None:
        return _MISSING
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def byte_words(count: float | None, digits: int = _DIGITS) -> str:
    """Returns bytes for people, with three digits unless told otherwise."""
    if count is None:
        return _MISSING
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= scale:
            return f"{count / scale:.{digits}g} {unit}"
    return f"{count:.{digits}g} B"


def _quartile_words(row: Row) -> str:
    if row.lower_quartile_seconds is None:
        return _MISSING
    return f"{time_words(row.lower_quartile_seconds)} to {time_words(row.upper_quartile_seconds)}"


def _error_words(row: Row) -> str:
    if row.error is None:
        return _MISSING
    exact = "" if row.error_in_float64 is None else f" (float64: {row.error_in_float64:.0e})"
    return f"{row.error:.1e}{exact}{' DISAGREES' if row.agrees is False else ''}"


def _ratio_words(ratio: float, digits: int = _DIGITS) -> str:
    return f"1/{1 / ratio:.{digits}g}" if 0 < ratio < 1 / 3 else f"{ratio:.{digits}g}"


def _told_apart(figure: float, wanted: float, words: Callable[[float, int], str]) -> str:
    """Returns a figure in words, with as many digits as tell it from what was wanted, where they differ."""
    digits = _DIGITS
    while figure != wanted and digits < _ALL_DIGITS and words(figure, digits) == words(wanted, digits):
        digits += 1
    return words(figure, digits)
