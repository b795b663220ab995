"""The hypergradient by `higher`."""

from __future__ import annotations

import copy

import higher
import torch
from torch import Tensor

from benchmarks.contestant import Contestant, Outcome, Side, run_peer
from benchmarks.job import Job
from hypertorch.types import TensorDict


class Higher(Contestant):
    """`higher.innerloop_ctx` around a `torch.optim.SGD`, with `torch.autograd.grad` of the outer loss.

    Called as its own examples do, in the way that computes no more than needed: the initial weights are not copied
    (`copy_initial_weights=False`, which is also the only way to their gradient), higher derivatives are tracked, and
    the gradient is asked for the outer variables alone. Tasks are a loop: `higher` has no other way, as its
    optimisers take a gradient by `torch.autograd.grad`, which cannot be vectorised.
    """

    side: Side = "peer"

    @property
    def library(self) -> str:
        """The library's name in the table."""
        return "higher"

    def run(self, job: Job) -> Outcome:
        """Returns the hypergradient."""
        network = copy.deepcopy(job.network)

        def outer_loss(variables: TensorDict, task: int) -> Tensor:
            optimizer = torch.optim.SGD(network.parameters(), lr=job.lr, momentum=job.momentum)
            with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False, track_higher_grads=True) as (
                fast,
                steps,
            ):
                for step in range(job.num_steps):
                    steps.step(job.inner_loss(fast, variables, job.of_task(job.inner_batch(step), task)))
                return job.outer_loss(fast, variables, job.of_task(job.outer_batch, task))

        return run_peer(job, network, outer_loss)
