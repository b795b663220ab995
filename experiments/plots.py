"""Pictures of what a run learnt, as PNG files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hypertorch.fewshot import Episode, Examples

Series = tuple[list[float], list[float]]
Function = Callable[[Tensor], Tensor]
_LOG_LR = "log_lr"
_RIGHT, _WRONG = "tab:green", "tab:red"
_QUERIES_SHOWN = 3
_CURVES = 3


def plot_learning_curve(metrics: Path, path: Path, metric: str) -> None:
    """Draws outer loss and main figure against the outer step, in training and in validation.

    Args:
        metrics: a run's metrics.jsonl.
        path: the picture.
        metric: the main figure.
    """
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("outer_loss", metric), strict=True):
        steps, values = _series(records, name)
        axes.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=0.8)
        axes.plot(steps, _smoothed(values), color="tab:blue", label="training")
        axes.plot(*_series(records, f"validation/{name}"), color="tab:orange", marker=".", label="validation")
        if name in ("outer_loss", "mse") and values and min(values) > 0:
            axes.set_yscale("log")
        axes.set(xlabel="outer step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _series(records: Sequence[dict[str, float]], name: str) -> Series:
    chosen = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in chosen], [record[name] for record in chosen]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Returns a running mean over a twentieth of the run."""
    window = max(1, len(values) // 20)
    starts = (max(0, index + 1 - window) for index in range(len(values)))
    return [sum(values[start : index + 1]) / (index + 1 - start) for index, start in enumerate(starts)]


def plot_image_episode(episode: Episode, predict: Function, path: Path) -> None:
    """Draws one episode: the support images by class, and queries with the class they were given.

    Args:
        episode: one episode, no tasks axis; inputs `(examples, channels, height, width)`.
        predict: from query images to logits, fitted to the support set.
        path: the picture.
    """
    support, query = episode
    way = int(support.targets.max()) + 1
    shot = len(support.targets) // way
    predicted = predict(query.inputs).argmax(dim=-1)
    rows = shot + min(_QUERIES_SHOWN, len(query.targets) // way)
    figure = Figure(figsize=(1.3 * way + 0.6, 1.4 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, way, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for label in range(way):
        of_class = (support.targets == label).nonzero().flatten()[:shot]
        for row, index in enumerate(of_class.tolist()):
            _show_image(grid[row, label], support.inputs[index])
        grid[0, label].set_title(f"class {label}", fontsize=9)
        asked = (query.targets == label).nonzero().flatten()[:_QUERIES_SHOWN]
        for row, index in enumerate(asked.tolist(), start=shot):
            _show_image(grid[row, label], query.inputs[index])
            guess = int(predicted[index])
            colour = _RIGHT if guess == label else _WRONG
            grid[row, label].set_title(f"→ {guess}", fontsize=9, color=colour)
    grid[0, 0].set_ylabel("support")
    grid[shot, 0].set_ylabel("query")
    accuracy = float((predicted == query.targets).float().mean())
    figure.suptitle(f"an episode of unseen classes: {100 * accuracy:.0f} % of its queries right", fontsize=10)
    figure.savefig(path, dpi=120)


def _show_image(axes: Axes, image: Tensor) -> None:
    pixels = _array(image)
    if len(pixels) == 1:
        axes.imshow(pixels[0], cmap="gray_r", vmin=0, vmax=1)
    else:
        axes.imshow(pixels.transpose(1, 2, 0).clip(0, 1))


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def plot_curve_episodes(
    episodes: Sequence[Episode],
    before: Callable[[Examples], Function],
    after: Callable[[Examples], Function],
    path: Path,
) -> None:
    """Draws regression tasks of one variable: points, and the learner's curve before and after fitting.

    Args:
        episodes: tasks, no tasks axis; inputs and targets `(examples, 1)`.
        before: from a support set to the function before any inner step.
        after: from a support set to the fitted function.
        path: the picture.
    """
    shown = episodes[:_CURVES]
    figure = Figure(figsize=(4 * len(shown), 3.4), layout="constrained")
    for axes, (support, query) in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        both = torch.cat([support.inputs, query.inputs])
        grid = torch.linspace(float(both.min()), float(both.max()), 200, dtype=both.dtype, device=both.device)
        for learner, label, style in ((before, "before", ":"), (after, "after fitting", "-")):
            values = learner(support)(grid.unsqueeze(-1)).squeeze(-1)
            axes.plot(_array(grid), _array(values), linestyle=style, color="tab:blue", label=label)
        axes.scatter(_array(query.inputs), _array(query.targets), s=12, color="tab:gray", label="query")
        axes.scatter(
            _array(support.inputs), _array(support.targets), s=30, color="tab:orange", marker="^", label="support"
        )
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_step_sizes(hparams: dict[str, Tensor], path: Path) -> bool:
    """Draws learnt inner step sizes and returns whether there were any.

    Args:
        hparams: trained outer variables; those called `log_lr` or `log_lr.<parameter>` are logarithms of step sizes.
        path: the picture.
    """
    sizes = {
        name.removeprefix(_LOG_LR).removeprefix(".") or "all weights": _array(value.exp())
        for name, value in hparams.items()
        if name == _LOG_LR or name.startswith(f"{_LOG_LR}.")
    }
    if not sizes:
        return False
    figure = Figure(figsize=(6, max(2.0, 1.2 + 0.3 * len(sizes))), layout="constrained")
    axes = figure.subplots()
    schedule = sizes.get("all weights")
    if schedule is not None and schedule.ndim == 1:
        axes.plot(range(1, len(schedule) + 1), schedule, marker="o")
        axes.set(xlabel="inner step", ylabel="learnt step size")
    else:
        means = [float(value.mean()) for value in sizes.values()]
        axes.barh(list(sizes), means)
        axes.set(xlabel="learnt step size (mean)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
