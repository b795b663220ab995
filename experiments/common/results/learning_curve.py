"""The learning curve of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

Series = tuple[list[float], list[float]]


def plot_learning_curve(metrics: Path, path: Path, metric: str) -> None:
    """Draws outer loss and main figure against the outer step, in training and in validation.

    Args:
        metrics: a run's metrics.jsonl.
        path: the picture.
        metric: the main figure.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("outer_loss", metric), strict=True):
        steps, values = logged(metrics, name)
        axes.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=0.8)
        axes.plot(steps, _smoothed(values), color="tab:blue", label="training")
        axes.plot(*logged(metrics, f"validation/{name}"), color="tab:orange", marker=".", label="validation")
        if name in ("outer_loss", "mse") and values and min(values) > 0:
            axes.set_yscale("log")
        axes.set(xlabel="outer step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def logged(metrics: Path, name: str) -> Series:
    """Returns the outer steps at which a figure was logged, and its values.

    Args:
        metrics: a run's metrics.jsonl.
        name: of the figure.
    """
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    chosen = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in chosen], [record[name] for record in chosen]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Returns a running mean over a twentieth of the run."""
    window = max(1, len(values) // 20)
    starts = (max(0, index + 1 - window) for index in range(len(values)))
    return [sum(values[start : index + 1]) / (index + 1 - start) for index, start in enumerate(starts)]
