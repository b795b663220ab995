"""Pictures of what the diagnostics found, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

import hypertorch as ht
from experiments.common.diagnostics.settings_grid import Field
from experiments.common.results.line_styles import COLOURS, line_styles
from hypertorch.diagnostics.horizon import Series
from hypertorch.search import RangeFigures

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
        (
            f"relative error of the hypergradient (none is drawn as {_FLOOR:g})",
            "log",
            lambda row: max(row["error"], _FLOOR),
        ),
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
    windows, runs = figure.subplots(1, 2)
    windows.set(title="error of a window of the run", xlabel="window (steps)")
    runs.set(title="error after a number of steps", xlabel="inner steps")
    styles = line_styles(bias.series)
    of_windows: list[Series] = [name for name in bias.series if name == "truncated"]
    of_runs: list[Series] = [name for name in bias.series if name != "truncated"]
    for axes, names in ((windows, of_windows), (runs, of_runs)):
        points = [point for name in names for point in bias.series[name] if point.accuracy.error > 0]
        axes.set(yscale="log", ylabel="relative error")
        axes.grid(alpha=0.3)
        if not points:
            continue
        for name in names:
            _draw_series(axes, name, bias, styles[name])
        lengths = np.linspace(0, max(point.length for point in points), 200)
        slope = radius**lengths
        seen = slope >= min(point.accuracy.error for point in points)
        axes.plot(lengths[seen], slope[seen], "k:", linewidth=1.2, label=f"spectral radius {radius:.4f} per step")
        axes.legend(fontsize=9, title="thin lines: fits", title_fontsize=9)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)


def _draw_series(axes: Axes, name: Series, bias: ht.HorizonBias, style: dict[str, Any]) -> None:
    shown = [point for point in bias.series[name] if point.accuracy.error > 0]
    lengths = np.array([point.length for point in shown])
    fit = bias.fits[name]
    rate = "no rate to be told" if fit is None else f"falls by {fit.rate:.4f} per step"
    axes.plot(lengths, [point.accuracy.error for point in shown], label=f"{name}: {rate}", **style)
    if fit is not None:
        axes.plot(lengths, fit.factor * fit.rate**lengths, color=style["color"], linewidth=0.8, alpha=0.7)


def plot_spectral_radius(spectra: Sequence[ht.SpectralRadius], path: Path) -> None:
    """Draws the spectrum of the last step's map in the complex plane, and radius and growth along the run.

    Args:
        spectra: at several steps, the last of which has the growths that are drawn; of a problem without tasks.
        path: the picture.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    plane, run = figure.subplots(1, 2)
    last = spectra[-1]
    angles = np.linspace(0, 2 * np.pi, 400)
    plane.plot(np.cos(angles), np.sin(angles), color="0.5", linewidth=1.0, label="unit circle")
    plane.scatter(
        last.ritz_values.real.tolist(),
        last.ritz_values.imag.tolist(),
        s=18,
        color=COLOURS[0],
        label="eigenvalue estimates (outline)",
    )
    leading = complex(last.eigenvalues)
    plane.scatter(
        leading.real, leading.imag, s=90, marker="*", color=COLOURS[1], zorder=3, label=f"largest: {abs(leading):.4f}"
    )
    plane.set(aspect="equal", xlabel="real part", ylabel="imaginary part")
    plane.set_title(f"step {last.step}: the inner map {last.verdict}")
    plane.legend(fontsize=9, loc="lower left")
    run.axhline(1.0, color="0.5", linewidth=1.0)
    run.plot(
        range(1, last.step + 2),
        last.step_growths.tolist(),
        color=COLOURS[0],
        linewidth=1.2,
        label=f"growth of the product at each step, mean {last.growth:.4f}",
    )
    run.plot(
        [item.step + 1 for item in spectra],
        [item.radius for item in spectra],
        color=COLOURS[1],
        marker="*",
        markersize=9,
        linestyle="--",
        label="spectral radius of the step's map",
    )
    run.set(xscale="log", xlabel="inner step", ylabel="factor per step", title="above 1, changes of the state grow")
    run.legend(fontsize=9)
    for axes in (plane, run):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)


def plot_range_test(
    figures: RangeFigures,
    suggestion: float | None,
    outer_losses: Mapping[float, float],
    num_steps: int,
    path: Path,
) -> None:
    """Draws the curve of a range test with the rates that it found, and beside it the outer loss of constant rates.

    Args:
        figures: the curve.
        suggestion: the rate that it suggests; None if there is none.
        outer_losses: after training at a constant rate, by the rate; none for no second panel.
        num_steps: of that training (unit: inner steps).
        path: the picture.
    """
    figure = Figure(figsize=(12 if outer_losses else 7, 4.5), layout="constrained")
    axes, *others = figure.subplots(1, 2 if outer_losses else 1, squeeze=False)[0]
    finite = len(figures.smoothed)
    axes.plot(figures.rates, figures.losses, ".", color="0.6", markersize=4, label="loss of a step")
    axes.plot(figures.rates[:finite], figures.smoothed, color=COLOURS[0], label="fitted lines")
    marked = {"steepest, suggested": suggestion, "lowest": figures.lowest, "blow-up": figures.blow_up}
    for (label, rate), colour, dashes in zip(
        marked.items(), (*COLOURS[2:3], *COLOURS[4:5], *COLOURS[1:2]), ("-", "--", ":"), strict=True
    ):
        if rate is not None and math.isfinite(rate):
            axes.axvline(rate, color=colour, linestyle=dashes, linewidth=1.8, label=f"{label}: {rate:.3g}")
    if finite:
        # What comes after the blow-up would take all of the height.
        start, least = float(figures.smoothed[0]), float(figures.smoothed.min())
        margin = 0.6 * abs(start - least)
        axes.set_ylim(least / 1.5 if figures.scale == "log" else least - margin, max(2.0 * start, start + margin))
    axes.set(xscale="log", yscale=figures.scale, xlabel="learning rate, growing from step to step", ylabel="inner loss")
    axes.set_title(
        "One run with a growing rate" if suggestion is not None else "One run with a growing rate: nothing to suggest"
    )
    axes.legend(fontsize=9, loc="lower left")
    for right in others:
        rates, losses = list(outer_losses), list(outer_losses.values())
        right.plot(rates, losses, marker="o", color=COLOURS[0], label="trained at a constant rate")
        if suggestion is not None:
            right.plot(
                suggestion, outer_losses[suggestion], "o", markersize=11, color=COLOURS[2], label="at the suggestion"
            )
        known = sorted(loss for loss in losses if math.isfinite(loss))
        if known:
            right.set_ylim(known[0] / 1.3, 1.3 * known[len(known) // 2] + known[0])
        right.set(xscale="log", xlabel="learning rate", ylabel=f"outer loss after {num_steps} inner steps")
        right.set_title("Constant rates (points above the frame are left out)")
        right.legend(fontsize=9)
    for one in (axes, *others):
        one.grid(alpha=0.3)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)


def _degrees(cosine: float) -> float:
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))


def _mark_lengths(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xticks([], minor=True)


def _spelt(name: str) -> str:
    return name.replace("_", " ")


def plot_field(field: Field, num_steps: int, path: Path) -> None:
    """Draws the outer loss as filled contours, and the way downhill as arrows, whose length is cut.

    Args:
        field: losses and hypergradients at the points of a grid.
        num_steps: of the runs (unit: inner steps).
        path: the picture.
    """
    points = round(len(field.losses) ** 0.5)
    # Drawn in the coordinates of the derivatives, in which the arrows are at right angles to the contours.
    x, y, losses, right, up = (
        value.double().cpu().numpy().reshape(points, points)
        for value in (*field.coordinates, field.losses, *field.hypergradients)
    )
    figure = Figure(figsize=(8.5, 6.6), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.75")  # seen where a run diverged
    finite = losses[np.isfinite(losses)]
    if len(finite):
        # Beyond three quarters of all losses the colour stays the same: a few large ones would take all of it.
        low, high = float(finite.min()), float(np.quantile(finite, 0.75))
        # Closer together where the loss is low, and is what one looks for.
        levels = low + (high - low if high > low else 1.0) * np.linspace(0.0, 1.0, 25) ** 3
        norm = PowerNorm(1.0 / 3.0, vmin=float(levels[0]), vmax=float(levels[-1]))
        shown = axes.contourf(
            x, y, np.ma.masked_invalid(losses), levels=levels, norm=norm, cmap="viridis", extend="max"
        )
        figure.colorbar(shown, ax=axes, format="%.3g", label=f"outer loss after {num_steps} inner steps")
    # In cells of the grid, so that an arrow is as long whatever the units of an axis.
    cells = np.array([x[0, 1] - x[0, 0], y[1, 0] - y[0, 0]])
    steps = -np.stack([right * cells[0], up * cells[1]])
    lengths = np.hypot(*steps)
    known = np.isfinite(lengths)
    longest = float(np.quantile(lengths[known], 0.5)) if known.any() else 1.0
    factor = 0.8 / np.maximum(lengths, max(longest, 1e-30))
    axes.quiver(
        x[known], y[known], (steps[0] * factor * cells[0])[known], (steps[1] * factor * cells[1])[known],
        angles="xy", scale_units="xy", scale=1.0, color="white", edgecolor="black", linewidth=0.4, width=0.004,
    )  # fmt: skip
    axes.plot(x[~known], y[~known], "x", color="tab:red", markersize=5, label="run or hypergradient diverged")
    if (~known).any():
        figure.legend(loc="outside lower right", frameon=False)
    names = [f"{axis.name} ({axis.scale} scale)" for axis in field.axes]
    axes.set(xlabel=names[0], ylabel=names[1], title="Downhill by the hypergradient (arrows cut at the median length)")
    for axis, own, limits in zip(field.axes, (axes.xaxis, axes.yaxis), (x[0], y[:, 0]), strict=True):
        if axis.scale == "log":
            decades = np.arange(np.ceil(limits[0] / np.log(10.0)), np.floor(limits[-1] / np.log(10.0)) + 1)
            own.set_ticks(decades * np.log(10.0), [f"{10.0**decade:g}" for decade in decades])
    figure.savefig(path, dpi=_PIXELS_PER_INCH)
