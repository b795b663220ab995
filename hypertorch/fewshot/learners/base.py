"""What a few-shot learner is: a bilevel problem built around an episode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples
from hypertorch.problem import BilevelProblem, ProblemSource, TaskRoute
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

    def on(
        self,
        episodes: EpisodeSource,
        *,
        task_route: TaskRoute = "auto",
        task_chunk: int | None = None,
        inner_dtype: torch.dtype | None = None,
    ) -> ProblemSource:
        """Returns this learner's problems on a stream of episodes, for an outer loop or an evaluation.

        Cost: one adaptation to the first episode, to see that network and episodes fit.

        Args:
            episodes: the episodes.
            task_route: how the episodes of a batch are run: as `BilevelProblem.task_route` says; "auto" measures.
                The two agree up to rounding; name one where runs must be equal to the last bit.
            task_chunk: episodes run at once under "vmap" (memory is proportional to it); None for all.
            inner_dtype: `torch.bfloat16` computes the products of the inner loss in it; see `BilevelProblem`.

        Raises:
            TypeError: if `episodes` are no source of episodes.
            ValueError: if the network cannot take the inputs, or has not one output per class, or `task_chunk` or
                `task_route` cannot be.
        """
        if not isinstance(episodes, EpisodeSource):
            raise TypeError(
                f"`episodes` is a {type(episodes).__name__}, which draws no episodes. Pass an `EpisodeSource`, such as "
                "`EpisodeSampler(dataset, way=5, shot=1, num_queries=15, num_tasks=4)`."
            )
        batch = episodes.at(0)
        _check_fit(self, batch)
        source = LearnerOnEpisodes(self, episodes, task_route, task_chunk, inner_dtype)
        source.with_settings(self.problem(batch, episodes.num_tasks))
        return source


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


def check_examples(examples: Examples, role: str, *, way: int | None = None) -> None:
    """Raises if examples of one task are not what a learner can fit.

    Args:
        examples: inputs and targets, without a tasks axis.
        role: "support" or "query", for the message.
        way: classes of which each needs an example; None if targets are values, or some classes may be missing.

    Raises:
        TypeError: if inputs or targets are no tensors, or labels are of another type than int64.
        ValueError: if there is not one target per input, there are none, or a label or class cannot be.
    """
    inputs, targets = examples
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`{role}` has {name} of type {type(value).__name__}: learners work on tensors. Pass "
                "`Examples(inputs, targets)` of two tensors, for instance by `torch.as_tensor`."
            )
    if inputs.dim() < 2 or targets.dim() < 1 or len(inputs) != len(targets) or not inputs.is_floating_point():
        raise ValueError(
            f"`{role}` has inputs of shape {tuple(inputs.shape)} ({inputs.dtype}) and targets of shape "
            f"{tuple(targets.shape)}: a task needs floating-point inputs, one row per example, and one target for "
            "each. Drop a tasks axis with `[0]`, and scale images to floats in [0, 1]."
        )
    if len(inputs) == 0:
        raise ValueError(f"`{role}` is empty: there is nothing to learn from. Give it an example of every class.")
    if not targets.is_floating_point():
        _check_labels(targets, role, way)


def check_dtype(inputs: Tensor, role: str, hparams: TensorDict) -> None:
    """Raises `ValueError` if inputs are of another floating-point type than the outer variables.

    Args:
        inputs: of one task.
        role: what they are, for the message.
        hparams: the outer variables.
    """
    dtype = next((value.dtype for value in hparams.values()), inputs.dtype)
    if inputs.dtype != dtype:
        raise ValueError(
            f"`{role}` has inputs of {inputs.dtype}, but the learner's weights are {dtype}: PyTorch multiplies none by "
            f"the other. Convert them: `inputs.to({dtype})`."
        )


def _check_labels(labels: Tensor, role: str, way: int | None) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(
            f"`{role}` has labels of {labels.dtype}, which the losses of classification do not take. Convert them: "
            "`labels.long()`."
        )
    present = set(labels.flatten().tolist())
    allowed = range(way) if way is not None else range(max(present) + 1)
    if not present <= set(allowed):
        raise ValueError(
            f"`{role}` has labels {sorted(present)}, but classes count from 0"
            f"{'' if way is None else f' to {way - 1}'}. Number the classes of the task anew"
            f"{'' if way is None else f', or build the learner with `way={max(present) + 1}`'}."
        )
    missing = [] if way is None else sorted(set(allowed) - present)
    if missing:
        raise ValueError(
            f"`{role}` has no example of the classes {missing}, of {way}: nothing would be known of them. Give one of "
            "each, or build the learner with a smaller `way`."
        )


@dataclass(frozen=True)
class LearnerOnEpisodes(ProblemSource):
    """A learner bound to episodes: the problem of an outer step is that of the step's batch of episodes.

    Args:
        learner: the learner.
        episodes: the episodes.
        task_route: how the episodes of a batch are run.
        task_chunk: episodes run at once.
        inner_dtype: of the products of the inner loss.
    """

    learner: Learner
    episodes: EpisodeSource
    task_route: TaskRoute = "auto"
    task_chunk: int | None = None
    inner_dtype: torch.dtype | None = None

    def init_hparams(self) -> TensorDict:
        """Returns the learner's outer variables before training."""
        return self.learner.init_hparams()

    def at(self, outer_step: int) -> BilevelProblem:
        """Returns the problem of an outer step's batch of episodes."""
        return self.with_settings(self.learner.problem(self.episodes.at(outer_step), self.episodes.num_tasks))

    def with_settings(self, problem: BilevelProblem) -> BilevelProblem:
        """Returns the problem of a batch of episodes, with its tasks run as is set here."""
        return replace(problem, task_route=self.task_route, task_chunk=self.task_chunk, inner_dtype=self.inner_dtype)
