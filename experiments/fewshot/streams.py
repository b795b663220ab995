"""The streams of episodes of a run: no two are the same, and neither are those of runs with different seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.settings import ProblemSettings
from experiments.fewshot.settings import SPLITS, FewShotSettings
from hypertorch.fewshot import EpisodeSource

_STREAMS = ("train", "validate", *(f"evaluate {split}" for split in SPLITS))


@dataclass(frozen=True, kw_only=True)
class EpisodeStreams:
    """Makes the episodes of a run: for training, for validation, and for the evaluation of each split.

    Args:
        config: the configuration, for the groups `dataset`, `episodes` and `training.augmentation`.
        settings: the plain settings of all experiments.
        own: the plain settings of few-shot learning.
    """

    config: DictConfig
    settings: ProblemSettings
    own: FewShotSettings

    def training(self) -> EpisodeSource:
        """Returns the episodes to learn from."""
        return self._stream("train", "+".join(self.own.train_split))

    def validation(self) -> EpisodeSource:
        """Returns the episodes that choose the best outer variables."""
        return self._stream("validate", "meta_val")

    def evaluation(self, split: str, seed: int | None = None) -> EpisodeSource:
        """Returns the episodes of the final evaluation on a split.

        Args:
            split: one of `SPLITS`.
            seed: chooses other episodes; None for those that belong to the run.
        """
        return self._stream(f"evaluate {split}", split, seed)

    def _stream(self, purpose: str, split: str, seed: int | None = None) -> EpisodeSource:
        config = self.config
        number = len(_STREAMS) * (self.settings.seed if seed is None else seed) + _STREAMS.index(purpose)
        passed: dict[str, Any] = {"seed": number, "dtype": self.settings.dtype}
        given: dict[str, int | None]
        if purpose == "train":
            given = {"way": self.own.training.way, "shot": self.own.training.shot}
            if OmegaConf.select(config, "training.augmentation") is not None:
                passed["augmentation"] = build(config, "training.augmentation")
        else:
            given = {"num_queries": self.own.evaluation.num_queries}
        instead = {name: value for name, value in given.items() if value is not None}
        if config.dataset is None:
            return build(config, "episodes", instead=instead, **passed).to(self.settings.device)
        images = build(config, "dataset", split=split)
        try:
            return build(config, "episodes", images, instead=instead, **passed).to(self.settings.device)
        except ValueError as error:
            # The class knows its arguments only, not that some come from settings of another name here.
            where, group = ("training", "training") if purpose == "train" else ("the evaluation", "evaluation")
            hint = "".join(
                f" In {where} `{name}` is the setting {group}.{name}={value}." for name, value in instead.items()
            )
            task = purpose.split(maxsplit=1)[0]
            raise ExpectedFailure(f"the episodes of {split}, to {task} on: {error}{hint}") from error
