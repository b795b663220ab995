"""What an episode is, and where episodes come from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.checks.argument_types import check_fields


# Named tuples are trees to PyTorch: `vmap` cuts an episode into tasks without knowing the class.
class Examples(NamedTuple):
    """Inputs with their targets, one row per example.

    Attributes:
        inputs: `(tasks, examples, *item)`, floating point, or integers (token ids).
        targets: `(tasks, examples)` int64 labels in `0 .. way - 1` for classification, or `(tasks, examples, features)`
            floats for regression.
    """

    inputs: Tensor
    targets: Tensor


class Episode(NamedTuple):
    """A batch of few-shot problems: each task learns from its `support` and is judged on its `query`.

    Attributes:
        support: the examples a task is given, `way * shot` of them in classification (`shot` in regression), ordered by
            class, then by drawing.
        query: other examples of the same task, `way * num_queries` (or `num_queries`), in the same order. No example
            is in both.
    """

    support: Examples
    query: Examples


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a network must know of the tasks that it is to learn.

    Args:
        item_shape: shape of one input, `(channels, height, width)` for images.
        outputs: outputs of a network: the `way` of classification, the values of one target of regression.
        is_classification: whether targets are labels of classes, and not values.
    """

    item_shape: tuple[int, ...]
    outputs: int
    is_classification: bool

    def __post_init__(self) -> None:
        check_fields(self, "item_shape", "outputs", "is_classification")
        if self.outputs < 1 or min(self.item_shape, default=1) < 1:
            raise ValueError(
                f"`item_shape` of `TaskSpec` is {self.item_shape} and `outputs` {self.outputs}: a network has at least "
                "one input and one output. Pass numbers of at least 1."
            )

    @property
    def in_features(self) -> int:
        """Numbers in one input."""
        return math.prod(self.item_shape)


class EpisodeSource(ABC):
    """A stream of episode batches in which batch `step` is a pure function of `step`.

    Purity is what lets a run be replayed, resumed and evaluated anywhere: the same source gives the same batch in every
    process and worker, whatever was asked before.

    Attributes:
        num_tasks: episodes in one batch, the length of the leading `tasks` axis of every tensor.
    """

    num_tasks: int

    @abstractmethod
    def at(self, step: int) -> Episode:
        """Returns the batch of episodes number `step`, a pure function of it.

        Args:
            step: which batch, at least 0.

        Returns:
            An `Episode` whose tensors all start with a `tasks` axis of length `num_tasks`.
        """

    def to(self, device: torch.device | str) -> EpisodeSource:
        """Returns the same episodes on `device`, each batch copied there when it is asked for.

        A source that can keep its data there, or make its episodes there, overrides it.
        """
        return _Moved(source=self, device=torch.device(device))

    def task_spec(self) -> TaskSpec:
        """Returns what a network must know of these tasks, read off the first batch.

        Cost: one batch; a source that knows the answer overrides it.
        """
        inputs, targets = self.at(0).query
        is_classification = not targets.is_floating_point()
        # Every class of an episode has a query, and values have an axis of their own behind tasks and examples.
        outputs = int(targets.max()) + 1 if is_classification else math.prod(targets.shape[2:])
        return TaskSpec(item_shape=tuple(inputs.shape[2:]), outputs=outputs, is_classification=is_classification)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Moved(EpisodeSource):
    source: EpisodeSource
    device: torch.device

    @property
    def num_tasks(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.num_tasks

    def at(self, step: int) -> Episode:
        return Episode(
            *(Examples(*(tree.to_device(part, self.device) for part in part_of)) for part_of in self.source.at(step))
        )

    def to(self, device: torch.device | str) -> EpisodeSource:
        return self.source.to(device)

    def task_spec(self) -> TaskSpec:
        return self.source.task_spec()
