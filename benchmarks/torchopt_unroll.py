"""The hypergradient by `TorchOpt`, in each of the ways that it offers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.contestant import Contestant, NotMeasured, Outcome, Side, run_peer
from benchmarks.job import Job
from hypertorch import tree
from hypertorch.types import Batch, TensorDict

try:
    import torchopt  # pyright: ignore[reportMissingImports]
except ImportError:  # of the extra `benchmark`
    torchopt: Any = None


class _TorchOpt(Contestant):
    """Abstract: a way to call TorchOpt."""

    side: Side = "peer"

    @property
    def library(self) -> str:
        """The library's name in the table."""
        return "TorchOpt"


class TorchOptMeta(_TorchOpt):
    """`torchopt.MetaSGD` on the module: what TorchOpt's tutorials use.

    Module and optimiser are put back after a task from states extracted by reference, which copies nothing, as in its
    MAML example; outer variables that are initial weights are the module's own parameters.
    """

    def run(self, job: Job) -> Outcome:
        """Returns the hypergradient."""
        _require_torchopt()
        network = copy.deepcopy(job.network)
        optimizer = torchopt.MetaSGD(network, lr=job.lr, momentum=job.momentum)
        first_weights = torchopt.extract_state_dict(network)
        first_state = torchopt.extract_state_dict(optimizer)

        def outer_loss(variables: TensorDict, task: int) -> Tensor:
            torchopt.recover_state_dict(network, first_weights)
            torchopt.recover_state_dict(optimizer, first_state)
            for step in range(job.num_steps):
                optimizer.step(job.inner_loss(network, variables, job.of_task(job.inner_batch(step), task)))
            return job.outer_loss(network, variables, job.of_task(job.outer_batch, task))

        return run_peer(job, network, outer_loss)


class TorchOptFunctional(_TorchOpt):
    """`torchopt.FuncOptimizer` on a dictionary of weights, with `torch.func.functional_call` for the model.

    Without the traversal of modules that `MetaSGD` does at every step; which of the two is faster depends on the model.
    """

    def run(self, job: Job) -> Outcome:
        """Returns the hypergradient."""
        _require_torchopt()
        network = copy.deepcopy(job.network)
        names = [name for name, _ in network.named_parameters()]

        def outer_loss(variables: TensorDict, task: int) -> Tensor:
            optimizer = torchopt.FuncOptimizer(
                torchopt.sgd(lr=job.lr, momentum=job.momentum, moment_requires_grad=True)
            )
            params = tuple(network.parameters())
            for step in range(job.num_steps):
                predict = partial(_predict, job, dict(zip(names, params, strict=True)))
                loss = job.inner_loss(predict, variables, job.of_task(job.inner_batch(step), task))
                params = optimizer.step(loss, params)
            predict = partial(_predict, job, dict(zip(names, params, strict=True)))
            return job.outer_loss(predict, variables, job.of_task(job.outer_batch, task))

        return run_peer(job, network, outer_loss)


class TorchOptVectorised(_TorchOpt):
    """`torchopt.sgd` updates of gradients by `torch.func.grad`, all tasks at once by `torch.func.vmap`.

    No part of TorchOpt vectorises an inner loop, but its functional update rules can be used in one that the user
    writes; so this is a row of its own, and not among the peers that ratios are taken against. It is much faster than
    a loop over tasks where models are small, and holds the graphs of all tasks at once.
    """

    side: Side = "by hand"

    def run(self, job: Job) -> Outcome:
        """Returns the hypergradient."""
        _require_torchopt()
        if job.num_tasks is None:
            raise NotMeasured("there are no tasks to vectorise")
        rule = torchopt.sgd(lr=job.lr, momentum=job.momentum, moment_requires_grad=True)
        leaves = tree.leaves_requiring_grad(job.hparams)

        def outer_loss(inner_batches: list[Batch], outer_batch: Batch) -> Tensor:
            variables = job.with_context(leaves, outer_batch)
            params = job.initial_params(leaves)
            state = rule.init(params)
            for batch in inner_batches:
                grads = torch.func.grad(
                    lambda own, batch=batch: job.inner_loss(partial(_predict, job, own), variables, batch)
                )(params)
                updates, state = rule.update(grads, state, params=params, inplace=False)
                params = torchopt.apply_updates(params, updates, inplace=False)
            return job.outer_loss(partial(_predict, job, params), variables, outer_batch)

        batches = [job.inner_batch(step) for step in range(job.num_steps)]
        loss = torch.func.vmap(outer_loss)(batches, job.outer_batch).mean()
        return Outcome(grads=dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))


def _require_torchopt() -> None:
    if torchopt is None:
        raise NotMeasured("torchopt is not installed (it comes with the extra `benchmark`)")


def _predict(job: Job, params: TensorDict, *inputs: Any) -> Any:
    return functional_call(job.network, params, inputs)
