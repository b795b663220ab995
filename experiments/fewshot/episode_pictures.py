"""Pictures of how a trained learner does on an episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hypertorch.fewshot import Episode, EpisodeSource, Examples, Learner

Function = Callable[[Tensor], Tensor]
_RIGHT, _WRONG = "tab:green", "tab:red"
_QUERIES_SHOWN = 3
_CURVES = 3


def draw_episodes(
    learner: Learner,
    episodes: EpisodeSource,
    hparams: dict[str, Tensor],
    *,
    without_steps: Callable[[], Learner],
    path: Path,
) -> bool:
    """Draws the first episode of images, or the first tasks of one variable; returns False for anything else.

    Args:
        learner: the learner.
        episodes: where the episodes come from.
        hparams: trained outer variables.
        without_steps: makes the learner without inner steps.
        path: the picture.
    """
    tasks = tasks_of(episodes.at(0))
    support = tasks[0].support
    if support.inputs.dim() == 4 and not support.targets.is_floating_point():
        plot_image_episode(tasks[0], learner.adapt(hparams, support), path)
        return True
    if support.inputs.shape[1:] == (1,) and support.targets.shape[1:] == (1,):
        unfitted = without_steps()
        known = unfitted.init_hparams().keys()
        shared = {name: value for name, value in hparams.items() if name in known}
        plot_curve_episodes(
            tasks,
            lambda examples: unfitted.adapt(shared, examples),
            lambda examples: learner.adapt(hparams, examples),
            path,
        )
        return True
    return False


def tasks_of(batch: Episode) -> list[Episode]:
    """Returns the tasks of a batch, without their tasks axis."""
    support, query = batch
    return [
        Episode(Examples(*(part[task] for part in support)), Examples(*(part[task] for part in query)))
        for task in range(len(support.inputs))
    ]


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
