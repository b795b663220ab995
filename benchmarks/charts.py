"""Charts of a sweep: time and memory of every contestant against the size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ratios import BYTES, PEERS
from benchmarks.row import Row
from benchmarks.sweep import Growth
from benchmarks.work import Target
from experiments.common.results.line_styles import line_styles

_PIXELS_PER_INCH = 120
_PANELS = (("time", "time (s)", 1.0), ("memory", "peak memory above the data (MiB)", 2.0**20))


def plot_sweep(
    rows: Sequence[Row],
    exponents: Mapping[str, Mapping[str, Growth | None]],
    targets: Mapping[int, Sequence[Target]],
    *,
    axis: str,
    path: Path,
) -> None:
    """Draws a sweep: points, their fitted powers in the legend, and the bounds that the work sets as dotted lines.

    Args:
        rows: of all sizes and contestants.
        exponents: by contestant and quantity.
        targets: of the work at each size.
        axis: what the size counts.
        path: the picture.
    """
    names = list(dict.fromkeys(row.contestant for row in rows))
    styles = line_styles(names)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axes, (quantity, title, scale) in zip(figure.subplots(1, 2).flat, _PANELS, strict=True):
        drawn = [_draw(axes, rows, name, quantity, scale, exponents[name][quantity], styles[name]) for name in names]
        if quantity == "time":
            _draw_bounds(axes, rows, targets)
        axes.set(xscale="log", xlabel=axis, title=title)
        axes.grid(alpha=0.3)
        if any(drawn):
            axes.set_yscale("log")
            axes.legend(fontsize=8, handlelength=3.5)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)


def _draw(
    axes: Axes, rows: Sequence[Row], name: str, quantity: str, scale: float, fit: Growth | None, style: dict[str, Any]
) -> bool:
    """Draws a contestant's line and returns whether there was anything to draw."""
    figures = [(row.size, row.quantity(quantity)) for row in rows if row.contestant == name]
    points = sorted((size, figure / scale) for size, figure in figures if size is not None and figure)
    if not points:
        return False
    label = name if fit is None else f"{name}: power {fit.exponent:.2f}"
    axes.plot([size for size, _ in points], [figure for _, figure in points], label=label, **style)
    if fit is not None:
        ends = np.array([fit.first, fit.last])
        axes.plot(ends, fit.factor * ends**fit.exponent / scale, color=style["color"], linewidth=0.8, alpha=0.6)
    return True


def _draw_bounds(axes: Axes, rows: Sequence[Row], targets: Mapping[int, Sequence[Target]]) -> None:
    """Draws what the time may be where a work bounds it by another contestant's."""
    bounds: dict[str, list[tuple[int, float]]] = {}
    for size, wanted in sorted(targets.items()):
        for target in wanted:
            if target.quantity != "time" or target.against in (PEERS, BYTES):
                continue
            base = [row.min_seconds for row in rows if row.size == size and row.contestant == target.against]
            if base and base[0] is not None:
                bounds.setdefault(f"bound of {target.contestant}", []).append((size, target.at_most * base[0]))
    for name, points in bounds.items():
        axes.plot([size for size, _ in points], [bound for _, bound in points], "k:", linewidth=1.2, label=name)
