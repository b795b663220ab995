"""Pictures of what happens inside an episode: figures after each inner step, queries before and after adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, ScalarFormatter
from sklearn.decomposition import PCA
from torch import Tensor

import hypertorch as ht
from experiments.fewshot.episode_pictures import tasks_of
from hypertorch.fewshot import EpisodeSource, Learner

_MOST_POINTS = 16  # most inner steps after which metrics are taken: each takes a pass over the queries
_CLASSES_IN_LEGEND = 10


def draw_adaptation(
    learner: Learner,
    hparams: dict[str, Tensor],
    splits: Mapping[str, EpisodeSource],
    *,
    metric: str,
    num_episodes: int,
    path: Path,
    execution: ht.Execution,
) -> bool:
    """Draws the figure after each inner step, and the queries of an episode before and after adaptation.

    The curves are means over episodes with 95 % intervals. The queries are drawn by the two principal components of
    what `Learner.embed` returns, in the colour of their class. Returns False if there is nothing to draw: no inner
    step, and no classes.

    Args:
        learner: the learner.
        hparams: trained outer variables.
        splits: episodes by the name of their split; the queries drawn are those of the last one's first episode.
        metric: the figure.
        num_episodes: episodes of each curve.
        path: the picture.
        execution: how problems are run, as in training.
    """
    *_, (split, source) = splits.items()
    episode = tasks_of(source.at(0))[0]
    num_steps = learner.problem(episode, None).num_steps
    has_classes = not episode.query.targets.is_floating_point()
    columns = int(num_steps > 0) + 2 * int(has_classes)
    if not columns:
        return False
    figure = Figure(figsize=(4.2 * columns, 3.6), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False).flat)
    if num_steps:
        sources = {name: learner.on(episodes) for name, episodes in splits.items()}
        _draw_curves(panels.pop(0), hparams, sources, metric, num_episodes, num_steps, execution)
    if has_classes:
        embedding = learner.embed(hparams, episode)
        for axes, values, when in zip(panels, embedding, ("before", "after"), strict=True):
            _draw_queries(axes, values, episode.query.targets)
            axes.set_title(f"queries of a {split} episode {when} adaptation", fontsize=9)
    figure.savefig(path, dpi=120)
    return True


def figures_after_steps(
    source: ht.ProblemSource,
    hparams: dict[str, Tensor],
    *,
    metric: str,
    steps: Sequence[int],
    num_episodes: int,
    execution: ht.Execution,
) -> list[ht.Estimate]:
    """Returns the mean of a figure over episodes after each of some numbers of inner steps.

    Args:
        source: the episodes' problems.
        hparams: trained outer variables.
        metric: the figure.
        steps: numbers of inner steps, ascending.
        num_episodes: episodes at least; whole batches are run.
        execution: how problems are run.
    """
    rows: list[Tensor] = []
    while sum(map(len, rows)) < num_episodes:
        outer_step = len(rows)
        run = ht.unroll(source.at(outer_step), hparams, outer_step=outer_step, metrics_after=steps, execution=execution)
        rows.append(run.metrics_after[metric].double().reshape(-1, len(steps)))
    values = torch.cat(rows).cpu().numpy()
    return [
        ht.Estimate.from_sums(mean=float(column.mean()), variance=float(column.var(ddof=1)), count=len(column))
        for column in values.T
    ]


def shown_steps(num_steps: int) -> list[int]:
    """Returns after how many inner steps figures are taken: 0, 1, ... or, of a long run, at growing distances."""
    if num_steps < _MOST_POINTS:
        return list(range(num_steps + 1))
    return sorted({0, *np.geomspace(1, num_steps, _MOST_POINTS - 1).round().astype(int).tolist()})


def _draw_curves(
    axes: Axes,
    hparams: dict[str, Tensor],
    sources: Mapping[str, ht.ProblemSource],
    metric: str,
    num_episodes: int,
    num_steps: int,
    execution: ht.Execution,
) -> None:
    steps = shown_steps(num_steps)
    for split, source in sources.items():
        curve = figures_after_steps(
            source, hparams, metric=metric, steps=steps, num_episodes=num_episodes, execution=execution
        )
        means = [point.mean for point in curve]
        axes.errorbar(steps, means, [point.half_width for point in curve], marker=".", capsize=2, label=split)
    if num_steps >= _MOST_POINTS:
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_locator(FixedLocator([0, *(10**power for power in range(len(str(num_steps)))), num_steps]))
        axes.xaxis.set_major_formatter(ScalarFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="inner steps", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_queries(axes: Axes, values: Tensor, targets: Tensor) -> None:
    plane = PCA(n_components=2).fit_transform(values.detach().cpu().double().numpy())
    labels = targets.cpu().numpy()
    for label in np.unique(labels):
        points = plane[labels == label]
        axes.scatter(points[:, 0], points[:, 1], color=f"C{label % 10}", s=16, label=f"class {label}")
    axes.set(xticks=[], yticks=[], xlabel="first principal component of this panel", ylabel="second")
    if len(np.unique(labels)) <= _CLASSES_IN_LEGEND:
        axes.legend(fontsize=7)
