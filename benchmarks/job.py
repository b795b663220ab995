"""What all contestants compute: one hypergradient, stated once, in terms that every library can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

import hypertorch as ht
from hypertorch import tree
from hypertorch.types import Batch, TensorDict

Predict: TypeAlias = Callable[..., Any]
"""The inner network at some weights, as a function of its inputs: each library has its own way to make one."""

Loss: TypeAlias = Callable[[Predict, TensorDict, Batch], Tensor]
"""`(predict, outer variables, batch) -> scalar`."""

MakeDynamics: TypeAlias = Callable[["Job"], ht.Dynamics]
"""Makes an inner optimiser for a job."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stated:
    """A job as names, numbers and arrays, for a contestant of another framework, which has no use for the functions.

    Args:
        network: name of the network, "mlp", "conv4" or "transformer".
        network_settings: what its weights do not tell.
        losses: name of the kind of losses.
        loss_settings: numbers that the losses need.
        data: tensors of the losses, with a leading tasks axis if there are tasks.
    """

    network: str
    network_settings: Mapping[str, Any]
    losses: str
    loss_settings: Mapping[str, Any] = field(default_factory=dict)
    data: TensorDict


@dataclass(frozen=True, eq=False)
class Job:
    """A hypergradient to compute: gradient descent on a network's weights, differentiated in the outer variables.

    The losses are written once and call `predict`, so that every library runs the same arithmetic of the model; only
    how weights are updated, held and differentiated is each library's own.

    Args:
        network: the inner model, with its first weights; without dropout and stored statistics.
        hparams: the outer variables. Those named like a parameter of the network are its initialisation.
        inner_loss: of the inner network on the batch of a step.
        outer_loss: of the trained network on the outer batch.
        inner_batch: data of a step, a pure function of its index, with a leading tasks axis if there are tasks.
        outer_batch: data of the outer loss, with a leading tasks axis if there are tasks.
        num_steps: inner steps (unit: steps).
        lr: step size of the inner gradient descent.
        momentum: of `torch.optim.SGD`, whose buffer starts with the first gradient.
        num_tasks: None for one inner problem; else the hypergradient is the mean over tasks.
        context: computed once for a task from the outer variables and its outer batch; the losses read its entries
            beside the outer variables.
        own_problem: the same job as the library's users would state it; None to make one of the losses above.
        stated: the same job for another framework; None where there is none that could run it.

    Attributes:
        initialisation: names of the outer variables that are initial weights.
    """

    _: KW_ONLY
    network: nn.Module
    hparams: TensorDict
    inner_loss: Loss
    outer_loss: Loss
    inner_batch: Callable[[int], Batch]
    outer_batch: Batch
    num_steps: int
    lr: float
    momentum: float = 0.0
    num_tasks: int | None = None
    context: Callable[[TensorDict, Batch], TensorDict] | None = None
    own_problem: ht.BilevelProblem | None = None
    stated: Stated | None = None
    initialisation: frozenset[str] = field(init=False)
    _problems: dict[MakeDynamics | None, ht.BilevelProblem] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = {name for name, _ in self.network.named_parameters()}
        object.__setattr__(self, "initialisation", frozenset(names & self.hparams.keys()))

    @property
    def tasks(self) -> range:
        """The tasks, as a peer's user would loop over them: one where there is no tasks axis."""
        return range(1 if self.num_tasks is None else self.num_tasks)

    def of_task(self, batch: Batch, task: int) -> Batch:
        """Returns a task's part of a batch."""
        return batch if self.num_tasks is None else tree.map_batch(lambda value: value[task], batch)

    def with_context(self, hparams: TensorDict, outer_batch: Batch) -> TensorDict:
        """Returns the outer variables with the entries of a task's context."""
        return hparams if self.context is None else {**hparams, **self.context(hparams, outer_batch)}

    def initial_params(self, hparams: Mapping[str, Tensor]) -> TensorDict:
        """Returns the inner network's first weights: outer variables where they are learnt."""
        return {
            name: hparams[name] if name in self.initialisation else value.detach()
            for name, value in self.network.named_parameters()
        }

    def problem(self, make_dynamics: MakeDynamics | None = None) -> ht.BilevelProblem:
        """Returns the job as a bilevel problem, made once: a user states a problem once and differentiates it often.

        Args:
            make_dynamics: makes the inner optimiser; None for the gradient descent that the job names.
        """
        if self.own_problem is not None:
            return self.own_problem
        if make_dynamics not in self._problems:
            self._problems[make_dynamics] = ht.BilevelProblem(
                _Inner(self),
                _Outer(self),
                dynamics=(make_dynamics or _gradient_descent)(self),
                num_steps=self.num_steps,
                num_tasks=self.num_tasks,
            )
        return self._problems[make_dynamics]


def _gradient_descent(job: Job) -> ht.Dynamics:
    return ht.dynamics.SGD(lr=job.lr, momentum=job.momentum)


class _Inner(ht.InnerProblem):
    """The inner side of a job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._network = ht.FunctionalModule(job.network)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return self._job.initial_params(hparams)

    def batch(self, step: int) -> Batch:
        return self._job.inner_batch(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self._job.inner_loss(partial(self._network, params), hparams, batch)


class _Outer(ht.OuterProblem):
    """The outer side of a job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._network = ht.FunctionalModule(job.network)

    def init_hparams(self) -> TensorDict:
        return {name: value.detach().clone() for name, value in self._job.hparams.items()}

    def batch(self, outer_step: int) -> Batch:
        return self._job.outer_batch

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self._job.outer_loss(partial(self._network, params), hparams, batch)
