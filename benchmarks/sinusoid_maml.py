"""MAML on sine waves: many small tasks at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

import hypertorch as ht
from benchmarks import variants
from benchmarks.contestant import Contestant
from benchmarks.data import Source
from benchmarks.episodes import maml_job
from benchmarks.job import Job
from benchmarks.work import Target, Work
from hypertorch.fewshot import MAML, MLP, Regression, Sinusoid


@dataclass(frozen=True, kw_only=True)
class SinusoidMAML(Work):
    """MAML with the sinusoid network of Finn et al. (2017), MLP 1-40-40-1, ten support and ten query points.

    Args:
        num_tasks: tasks in the batch.
        num_steps: inner steps.
        hidden: width of the hidden layers.
    """

    num_tasks: int = 32
    num_steps: int = 5
    hidden: int = 40

    @property
    def title(self) -> str:
        """What is computed."""
        return f"MAML on sinusoid, MLP 1-{self.hidden}-{self.hidden}-1, {self.num_tasks} tasks, {self.num_steps} steps"

    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data."""
        network = Source.seeded(seed, device, dtype).network(MLP(hidden=(self.hidden, self.hidden)))
        lr = 0.01
        learner = MAML(network, dynamics=ht.dynamics.SGD(lr=lr), num_steps=self.num_steps, objective=Regression())
        episode = Sinusoid(num_tasks=self.num_tasks, seed=seed, dtype=dtype).to(device).at(0)
        return maml_job(
            learner,
            network,
            Regression(),
            episode,
            num_steps=self.num_steps,
            lr=lr,
            stated_network=("mlp", {"activation": "relu"}),
        )

    def contestants(self) -> Mapping[str, Contestant]:
        """Returns who takes part."""
        return variants.chosen(
            *variants.PEERS,
            variants.TORCHOPT_VECTORISED,
            variants.EAGER,
            variants.COMPILED,
            *variants.IN_JAX,
            variants.PLAIN,
        )

    def targets(self) -> tuple[Target, ...]:
        """Returns the ratios to be reached."""
        return (
            Target(contestant=variants.EAGER, quantity="time", against="peers", at_most=1 / 12),
            Target(contestant=variants.EAGER, quantity="time", against=variants.TORCHOPT_VECTORISED, at_most=1.05),
            Target(contestant=variants.COMPILED, quantity="time", against="peers", at_most=1 / 50),
            Target(contestant=variants.COMPILED, quantity="time", against=variants.JAX, at_most=1.2),
        )

    def tiny(self) -> SinusoidMAML:
        """Returns the same work in sizes that take no time."""
        return replace(self, num_tasks=min(self.num_tasks, 3), num_steps=2, hidden=4)
