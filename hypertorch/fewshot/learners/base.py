"""What a few-shot learner is: a bilevel problem built around an episode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples
from hypertorch.problem import BilevelProblem, ProblemSource
from hypertorch.types import TensorDict


class Learner(ABC):
    """Learns from few examples; what episodes share are its outer variables.

    A new learner is one file with three methods: what is shared (`init_hparams`), the bilevel problem of an episode
    (`problem`), and how a trained learner is used (`adapt`).
    """

    @abstractmethod
    def init_hparams(self) -> TensorDict:
        """Returns the outer variables before training."""

    @abstractmethod
    def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem of a batch of episodes.

        Args:
            episode: support and query examples, with a leading tasks axis unless `num_tasks` is None.
            num_tasks: episodes in the batch; None for a single one without a tasks axis.
        """

    @abstractmethod
    def adapt(self, hparams: TensorDict, support: Examples) -> Callable[[Tensor], Tensor]:
        """Returns a function from inputs to outputs (logits or values), fitted to one support set.

        Args:
            hparams: trained outer variables.
            support: inputs of shape `(way * shot, ...)` and targets; no tasks axis.
        """

    def on(self, episodes: EpisodeSource) -> ProblemSource:
        """Returns this learner's problems on a stream of episodes, for an outer loop or an evaluation."""
        return LearnerOnEpisodes(self, episodes)


@dataclass(frozen=True)
class LearnerOnEpisodes(ProblemSource):
    """A learner bound to episodes: the problem of an outer step is that of the step's batch of episodes.

    Args:
        learner: the learner.
        episodes: the episodes.
    """

    learner: Learner
    episodes: EpisodeSource

    def init_hparams(self) -> TensorDict:
        """Returns the learner's outer variables before training."""
        return self.learner.init_hparams()

    def at(self, outer_step: int) -> BilevelProblem:
        """Returns the problem of an outer step's batch of episodes."""
        return self.learner.problem(self.episodes.at(outer_step), self.episodes.num_tasks)
