"""Which picture shows how a trained learner does on an episode."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from experiments.assembly import build_learner
from experiments.plots import plot_curve_episodes, plot_image_episode
from hypertorch.fewshot import Episode, EpisodeSource, Examples, Learner


def draw_episodes(
    config: DictConfig, learner: Learner, episodes: EpisodeSource, hparams: dict[str, Tensor], path: Path
) -> bool:
    """Draws the first episode of images, or the first tasks of one variable; returns False for anything else.

    Args:
        config: the configuration, to build the learner without inner steps.
        learner: the learner.
        episodes: where the episodes come from.
        hparams: trained outer variables.
        path: the picture.
    """
    tasks = tasks_of(episodes.at(0))
    support = tasks[0].support
    if support.inputs.dim() == 4 and not support.targets.is_floating_point():
        plot_image_episode(tasks[0], learner.adapt(hparams, support), path)
        return True
    if support.inputs.shape[1:] == (1,) and support.targets.shape[1:] == (1,):
        unfitted = build_learner(config, num_steps=0, learn_lr=None)
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
