"""What a few-shot learner is: a bilevel problem built around an episode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples
from hypertorch.fewshot.learners.episode_checks import EpisodeCheck
from hypertorch.problem import BilevelProblem, ProblemSource
from hypertorch.types import TensorDict


class Embedding(NamedTuple):
    """Queries as vectors.

    Attributes:
        before: before adaptation, shape `(queries, size)`.
        after: after adaptation, shape `(queries, size)`, of another size perhaps.
    """

    before: Tensor
    after: Tensor


class Learner(ABC):
    """Learns from few examples; what episodes share are its outer variables.

    A new learner is one file with three methods: what is shared (`init_hparams`), the bilevel problem of an episode
    (`problem`), and how a trained learner is used (`adapt`).

    Attributes:
        needs_every_class: whether a support set must show every class, as for a head that is fitted to them.
    """

    needs_every_class: bool = False

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

    def embed(self, hparams: TensorDict, episode: Episode) -> Embedding:
        """Returns a vector for every query of an episode before and after adaptation, for pictures.

        Here the flattened inputs, and the outputs of the fitted learner; learners with a representation show that.

        Args:
            hparams: trained outer variables.
            episode: one episode, no tasks axis.
        """
        inputs = episode.query.inputs
        return Embedding(inputs.flatten(1), self.adapt(hparams, episode.support)(inputs))

    def on(self, episodes: EpisodeSource) -> ProblemSource:
        """Returns this learner's problems on a stream of episodes, for an outer loop or an evaluation.

        Cost: one adaptation to the first episode, to see that network and episodes fit, and to the first of every
        other shape or type of episode; a look at the labels of each batch.

        Args:
            episodes: the episodes.

        Raises:
            TypeError: if `episodes` are no source of episodes, or their labels are of a wrong type.
            ValueError: if the network cannot take the inputs, or has not one output per class. The problems of later
                outer steps raise the same for episodes that differ from the first.
        """
        if not isinstance(episodes, EpisodeSource):
            raise TypeError(
                f"`episodes` is a {type(episodes).__name__}, which draws no episodes. Pass an `EpisodeSource`, such as "
                "`EpisodeSampler(dataset, way=5, shot=1, num_queries=15, num_tasks=4)`."
            )
        # Sources are pure functions of the step, so the batch looked at here is the one of the first outer step.
        check = EpisodeCheck(self, episodes.num_tasks)
        batch = episodes.at(0)
        check(batch, 0)
        # Made for its errors: they are raised here, and not at the first outer step.
        self.problem(batch, episodes.num_tasks)
        return LearnerOnEpisodes(self, episodes, check)


@dataclass(frozen=True)
class LearnerOnEpisodes(ProblemSource):
    """A learner bound to episodes: the problem of an outer step is that of the step's batch of episodes.

    Args:
        learner: the learner.
        episodes: the episodes.
        check: sees that a batch of episodes is what the learner was built for.
    """

    learner: Learner
    episodes: EpisodeSource
    check: EpisodeCheck = field(compare=False, repr=False)

    def init_hparams(self) -> TensorDict:
        """Returns the learner's outer variables before training."""
        return self.learner.init_hparams()

    def at(self, outer_step: int) -> BilevelProblem:
        """Returns the problem of an outer step's batch of episodes.

        Raises:
            TypeError: if the batch is no episode, or its labels are of a wrong type.
            ValueError: if it is none that the learner was built for.
        """
        batch = self.episodes.at(outer_step)
        self.check(batch, outer_step)
        return self.learner.problem(batch, self.episodes.num_tasks)
