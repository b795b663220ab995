"""What a few-shot learner is: a bilevel problem built around an episode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples
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

        Cost: one adaptation to the first episode, to see that network and episodes fit.

        Args:
            episodes: the episodes.

        Raises:
            ValueError: if the network cannot take the inputs, or has not one output per class.
        """
        _check_fit(self, episodes.at(0))
        return LearnerOnEpisodes(self, episodes)


def _check_fit(learner: Learner, batch: Episode) -> None:
    """Raises `ValueError` if a learner cannot work on the first task of a batch of episodes."""
    support, query = (Examples(part.inputs[0], part.targets[0]) for part in batch)
    what = f"inputs of shape {tuple(support.inputs.shape)} and {support.inputs.dtype}"
    is_classification = not support.targets.is_floating_point()
    way = int(query.targets.max()) + 1 if is_classification else None
    try:
        outputs = learner.adapt(learner.init_hparams(), support)(query.inputs)
    except (RuntimeError, IndexError) as error:
        labels = f" and labels 0 to {way - 1}" if way is not None else ""
        raise ValueError(
            f"`episodes` have {what}{labels}, which the learner cannot work on ({str(error).splitlines()[0]}): its "
            "network was built for others. Match the network's input shape, dtype, device and outputs to the episodes."
        ) from error
    if way is not None and outputs.shape[-1] != way:
        raise ValueError(
            f"`episodes` have {way} classes, but the learner has {outputs.shape[-1]} outputs: each class needs one. "
            f"Build it with `way={way}` (a network for MAML as well), or change the `way` of the episodes."
        )


def check_hparams_of(learner: str, hparams: TensorDict, expected: TensorDict) -> None:
    """Raises `ValueError` if outer variables are not those of a learner.

    Args:
        learner: its name, for the message.
        hparams: what was handed in.
        expected: the learner's own, for their names and shapes.
    """
    missing = [name for name in expected if name not in hparams]
    if missing:
        raise ValueError(
            f"`hparams` of {learner} lacks {missing}: these weights would be missing from the model. Pass all entries "
            "of `learner.init_hparams()`, or those of a run with the same learner and network."
        )
    for name, value in expected.items():
        if hparams[name].shape != value.shape:
            raise ValueError(
                f"`hparams[{name!r}]` of {learner} has shape {tuple(hparams[name].shape)}, but the model has "
                f"{tuple(value.shape)} there: it was trained with another network. Build the learner as it was then."
            )


def check_examples(examples: Examples, role: str) -> None:
    """Raises `ValueError` if examples of one task do not have one target per input.

    Args:
        examples: inputs and targets, without a tasks axis.
        role: "support" or "query", for the message.
    """
    inputs, targets = examples
    if inputs.dim() < 2 or targets.dim() < 1 or len(inputs) != len(targets) or not inputs.is_floating_point():
        raise ValueError(
            f"`{role}` has inputs of shape {tuple(inputs.shape)} ({inputs.dtype}) and targets of shape "
            f"{tuple(targets.shape)}: a task needs floating-point inputs, one row per example, and one target for "
            "each. Drop a tasks axis with `[0]`, and scale images to floats in [0, 1]."
        )


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
