"""What a contestant is: a library, called in one of its ways, that computes the hypergradient of a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import nn

from benchmarks.job import Job
from hypertorch.types import TensorDict

Side: TypeAlias = Literal["ours", "peer", "by hand", "floor"]
"""Whose the contestant is: the library's, a peer as it is meant to be used, what a user can write with parts of a peer
or in another framework; the floor computes no hypergradient."""

OneTask: TypeAlias = Callable[[TensorDict, int], torch.Tensor]
"""`(outer variables with the context, task) -> outer loss`, with a graph to the outer variables."""


class NotMeasured(Exception):  # noqa: N818 (a row of the table, not a fault)
    """A contestant that cannot take part; its message is the reason that the table shows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a contestant computed.

    Attributes:
        grads: the hypergradient by the names of the outer variables; None from the floor.
        figures: numbers that the contestant counted itself.
    """

    grads: TensorDict | None
    figures: Mapping[str, float] = field(default_factory=dict)


class Contestant(ABC):
    """A library called in one way."""

    side: Side
    compiles = False
    """Whether its first run compiles."""
    own_framework = False
    """Whether it computes in a process without PyTorch, that of `command`."""

    @property
    @abstractmethod
    def library(self) -> str:
        """The library's name in the table."""

    def prepares(self, job: Job) -> bool:
        """Returns whether the first run of a job does what no later one does, so that it is not measured."""
        return self.compiles

    def command(self, job: Job, folder: Path) -> list[str]:
        """Returns the command of the process of a contestant with a framework of its own.

        The process answers lines of stdin by lines of JSON, as `benchmarks.turns` does.

        Args:
            job: the job.
            folder: where the process finds the job, and leaves its hypergradient.

        Raises:
            NotMeasured: if what it needs is missing.
        """
        raise NotImplementedError(f"{type(self).__name__} runs in a process with PyTorch")

    @abstractmethod
    def run(self, job: Job) -> Outcome:
        """Returns the hypergradient of the job.

        Raises:
            NotMeasured: if what it needs is missing.
        """


def run_peer(job: Job, network: nn.Module, one_task: OneTask) -> Outcome:
    """Returns the mean over tasks of what `one_task` computes, one task after the other.

    The graph of a task is freed before the next begins, which is the least memory that a loop over tasks can take, and
    how the peers' own examples do it (`backward` inside the loop). Outer variables that are initial weights are the
    parameters of the network, as a user of the peers has them.

    Args:
        job: the job.
        network: the network that the task starts from; its parameters take the values of outer variables.
        one_task: from the outer variables (leaves) with the context, and a task's number, to its outer loss.
    """
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name in job.initialisation:
            parameters[name].copy_(job.hparams[name])
    leaves = {
        name: parameters[name] if name in job.initialisation else value.detach().clone().requires_grad_()
        for name, value in job.hparams.items()
    }
    total: list[torch.Tensor] | None = None
    for task in job.tasks:
        loss = one_task(job.with_context(leaves, job.of_task(job.outer_batch, task)), task)
        grads = list(torch.autograd.grad(loss, list(leaves.values())))
        total = grads if total is None else [old + new for old, new in zip(total, grads, strict=True)]
    if total is None:
        raise NotMeasured("there is no task")
    return Outcome(grads={name: value / len(job.tasks) for name, value in zip(leaves, total, strict=True)})
