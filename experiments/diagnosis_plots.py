"""Pictures of what the diagnostics found, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hypertorch as ht
from experiments.line_styles import COLOURS, line_styles

Row = Mapping[str, Any]

_FLOOR = 1e-17  # where errors that are exactly zero are drawn
_PIXELS_PER_INCH = 120


def plot_comparison(rows: Sequence[Row], path: Path) -> None:
    """Draws error, angle, time and memory of each backend against the number of inner steps.

    Args:
        rows: of `BackendComparison.rows()`, each with its `num_steps`; those of refusals are left out.
        path: the picture.
    """
    served = [row for row in rows if row["refusal"] is None]
    names = list(dict.fromkeys(row["backend"] for row in served))
    styles = line_styles(names)
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels: list[tuple[str, str, Callable[[Row], float]]] = [
        ("relative error of the hypergradient", "log", lambda row: max(row["error"], _FLOOR)),
        ("angle to the exact hypergradient (degrees)", "linear", lambda row: _degrees(row["cosine"])),
        ("time (s)", "log", lambda row: row["min_seconds"]),
        ("most memory held by tensors (MiB)", "log", lambda row: row["peak_bytes"] / 2**20),
    ]
    for axes, (title, scale, height) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for name in names:
            own = [row for row in served if row["backend"] == name]
            axes.plot(
                [row["num_steps"] for row in own], [height(row) for row in own], label=_spelt(name), **styles[name]
            )
        axes.set(xscale="log", yscale=scale, xlabel="inner steps", title=title)
        _mark_lengths(axes, sorted({row["num_steps"] for row in served}))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, handlelength=3.5)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)


def plot_horizon_bias(bias: ht.HorizonBias, radius: float, path: Path) -> None:
    """Draws the error of each series against its length, with the fitted rates.

    Args:
        bias: the errors.
        radius: spectral radius of the inner map, whose slope is drawn for comparison.
        path: the picture.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = line_styles(bias.series)
    for name, points in bias.series.items():
        axes = left if name == "truncated" else right
        lengths = [point.length for point in points]
        errors = [point.accuracy.error for point in points]
        fit = bias.fits[name]
        rate = "no rate" if fit is None else f"falls by {fit.rate:.4f} per step"
        shown = [(length, error) for length, error in zip(lengths, errors, strict=True) if error > 0]
        axes.plot(*zip(*shown, strict=True), label=f"{name}: {rate}", **styles[name])
        if fit is not None:
            ends = np.array([min(lengths), max(length for length, _ in shown)])
            axes.plot(ends, fit.factor * fit.rate**ends, color=styles[name]["color"], linewidth=0.8, alpha=0.7)
    for axes, title, length in (
        (left, "error of a window of the run", "window (steps)"),
        (right, "error after a number of steps", "inner steps"),
    ):
        if axes.lines:
            _draw_slope(axes, radius)
            axes.legend(fontsize=9)
        axes.set(yscale="log", xlabel=length, ylabel="relative error", title=title)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)


def _draw_slope(axes: Axes, radius: float) -> None:
    """Draws `radius ** length` from 1 down to the bottom of the points."""
    lengths = np.linspace(0, max(line.get_xdata()[-1] for line in axes.lines), 100)
    lowest = min(
        line.get_ydata().min() if isinstance(line.get_ydata(), np.ndarray) else min(line.get_ydata())
        for line in axes.lines
    )
    heights = radius**lengths
    visible = heights >= lowest
    axes.plot(lengths[visible], heights[visible], "k:", linewidth=1.0, label=f"spectral radius {radius:.4f} per step")


def plot_spectral_radius(spectra: Sequence[ht.SpectralRadius], path: Path) -> None:
    """Draws the spectrum of the last step's map in the complex plane, and radius and growth along the run.

    Args:
        spectra: at several steps, the last of which has the growths that are drawn; of a problem without tasks.
        path: the picture.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    last = spectra[-1]
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 400))
    left.plot(circle.real, circle.imag, color="0.5", linewidth=1.0, label="unit circle")
    values = last.ritz_values.cpu().numpy()
    left.scatter(values.real, values.imag, s=18, color=COLOURS[0], label=f"eigenvalues (outline), step {last.step}")
    leading = complex(last.eigenvalues)
    left.scatter(
        leading.real, leading.imag, s=90, marker="*", color=COLOURS[1], zorder=3, label=f"largest: {abs(leading):.4f}"
    )
    left.set(aspect="equal", xlabel="real part", ylabel="imaginary part", title=f"the inner map {last.verdict}")
    left.legend(fontsize=9, loc="lower left")
    right.axhline(1.0, color="0.5", linewidth=1.0)
    right.plot(
        range(1, last.step + 2),
        last.step_growths.cpu().numpy(),
        color=COLOURS[0],
        linewidth=1.2,
        label=f"growth of the product at each step, mean {last.growth:.4f}",
    )
    right.plot(
        [item.step + 1 for item in spectra],
        [item.radius for item in spectra],
        color=COLOURS[1],
        marker="*",
        markersize=9,
        linestyle="--",
        label="spectral radius of the step's map",
    )
    right.set(xscale="log", xlabel="inner step", ylabel="factor per step", title="above 1, changes of the state grow")
    right.legend(fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)


def _degrees(cosine: float) -> float:
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))


def _mark_lengths(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xticks([], minor=True)


def _spelt(name: str) -> str:
    return name.replace("_", " ")
