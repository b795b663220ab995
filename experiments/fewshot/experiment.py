"""Few-shot learning as an experiment: episodes of seen classes to learn from, of unseen ones to be judged on."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar

from omegaconf import DictConfig

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.settings import ProblemSettings, TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.runs.experiment import Experiment
from experiments.fewshot.adaptation_pictures import draw_adaptation
from experiments.fewshot.episode_pictures import draw_episodes
from experiments.fewshot.learners import check_same_hparams, judged_learner, takes_dynamics, trained_learner
from experiments.fewshot.settings import SPLITS, FewShotSettings
from experiments.fewshot.step_sizes import plot_step_sizes
from experiments.fewshot.streams import EpisodeStreams
from hypertorch.fewshot import EpisodeSource, Learner
from hypertorch.types import TensorDict


def _idle(config: DictConfig, key: str) -> str | None:
    if key.split(".", maxsplit=1)[0] == "dynamics" and not takes_dynamics(config):
        return (
            "this run builds no `dynamics` (its learner takes none): it would have no effect. Leave it out, or choose "
            "another learner."
        )
    return None


class FewShot(Experiment):
    """A learner that is trained on episodes of some classes, chosen on others, and judged on all three splits."""

    READS: ClassVar = Reads(
        settings=(FewShotSettings,),
        blocks=("dataset", "episodes", "training.augmentation", "backbone", "dynamics", "learner"),
        idle=_idle,
        tables=("task", "learner_needs", "run_lengths"),
    )
    splits = SPLITS

    def __init__(self, config: DictConfig, settings: ProblemSettings) -> None:
        super().__init__(config, settings)
        self.own = parse(FewShotSettings, config)
        self.metric, self.mode = self.own.task.metric, self.own.task.mode
        self.streams = EpisodeStreams(config=config, settings=settings, own=self.own)
        self.learner = judged_learner(config, settings, self.own)

    def training(self) -> ht.ProblemSource:
        """Returns the learner's problems on the episodes to learn from."""
        # Both streams before the learner meets one: a split with too few classes is called by its name.
        episodes, _ = self.streams.training(), self._validation_episodes
        trainee = trained_learner(self.config, self.settings, self.own)
        check_same_hparams(trainee, self.learner)
        return self._on(trainee, episodes)

    def validation(self) -> ht.ProblemSource:
        """Returns the learner's problems on episodes of the validation classes."""
        return self._on(self.learner, self._validation_episodes)

    @cached_property
    def _validation_episodes(self) -> EpisodeSource:
        return self.streams.validation()

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the learner's problems on fresh episodes of a split."""
        return self._on(self.learner, self.streams.evaluation(split, seed))

    def check_training(self, settings: TrainSettings) -> None:
        """Refuses to choose the best outer variables on classes that are learned from."""
        if "meta_val" in self.own.train_split and settings.validation.every < settings.outer_loop.num_outer_steps:
            raise ExpectedFailure(
                f"`train_split` is {'+'.join(self.own.train_split)!r}, but the best of several validations on meta_val "
                "would give the final weights: they would be chosen on classes that were learned from. Set "
                f"validation.every={settings.outer_loop.num_outer_steps}, the length of the run, so that it ends with "
                "its last weights."
            )
        # What would be noticed in the first validation, or after the last outer step, is noticed here.
        self.evaluated_splits(settings.evaluation.splits)

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws learnt step sizes, an episode, and what happens within episodes."""
        plot_step_sizes(hparams, folder / "step_sizes.png")
        draw_episodes(
            self.learner,
            self.streams.evaluation(self._shown_split()),
            hparams,
            without_steps=lambda: judged_learner(self.config, self.settings, self.own, num_steps=0, learn_lr=None),
            path=folder / "episodes.png",
        )
        draw_adaptation(
            self.learner,
            hparams,
            {split: self.streams.evaluation(split) for split in ("meta_train", "meta_val")},
            metric=self.metric,
            num_episodes=self.own.pictures.num_episodes,
            execution=self.settings.execution.of(self.validation()),
            path=folder / "adaptation.png",
        )

    def _shown_split(self) -> str:
        """Returns the last split that is judged on: pictures leave the test classes alone where figures do."""
        settings = self.settings
        chosen = settings.evaluation.splits if isinstance(settings, TrainSettings) else None
        return self.evaluated_splits(chosen)[-1]

    def _on(self, learner: Learner, episodes: EpisodeSource) -> ht.ProblemSource:
        return learner.on(episodes)
