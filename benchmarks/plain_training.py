"""The floor: the same inner training by `torch.optim`, without any hypergradient."""

from __future__ import annotations

import copy

import torch

from benchmarks.contestant import Contestant, Outcome, Side
from benchmarks.job import Job


class PlainTraining(Contestant):
    """Trains the inner network in place with `torch.optim.SGD`, task after task, and evaluates the outer loss.

    No graph outlives its step. A hypergradient needs at least this much work, and cannot be had for less.
    """

    side: Side = "floor"

    @property
    def library(self) -> str:
        """The library's name in the table."""
        return "torch.optim"

    def run(self, job: Job) -> Outcome:
        """Returns an outcome without a hypergradient, after training."""
        network = copy.deepcopy(job.network)
        parameters = dict(network.named_parameters())
        for task in job.tasks:
            with torch.no_grad():
                variables = job.with_context(job.hparams, job.of_task(job.outer_batch, task))
                for name, value in job.initial_params(job.hparams).items():
                    parameters[name].copy_(value)
            optimizer = torch.optim.SGD(network.parameters(), lr=job.lr, momentum=job.momentum)
            for step in range(job.num_steps):
                optimizer.zero_grad()
                job.inner_loss(network, variables, job.of_task(job.inner_batch(step), task)).backward()
                optimizer.step()
            with torch.no_grad():
                job.outer_loss(network, variables, job.of_task(job.outer_batch, task))
        return Outcome(grads=None)
