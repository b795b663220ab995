"""A network whose steps are large: time is the arithmetic's, memory is what must be watched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks import variants
from benchmarks.contestant import Contestant
from benchmarks.data import Source, mlp
from benchmarks.job import Job
from benchmarks.weighted_examples import weighted_examples
from benchmarks.work import Target, Work

_FOR_GRAPHS = 1000  # steps beyond which a whole graph fits into no usual machine
_GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class LargeUnroll(Work):
    """MLP 784-256-10 on 1000 rows with a weight for every row.

    Args:
        num_steps: inner steps.
        num_rows: training examples.
        features: numbers per row.
        hidden: width of the hidden layer.
    """

    num_steps: int = 200
    num_rows: int = 1000
    features: int = 784
    hidden: int = 256

    @property
    def title(self) -> str:
        """What is computed."""
        return f"MLP {self.features}-{self.hidden}-10, {self.num_rows} rows, {self.num_steps:,} steps, example weights"

    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data."""
        return weighted_examples(
            Source.seeded(seed, device, dtype),
            mlp(self.features, self.hidden, 10),
            features=self.features,
            classes=10,
            rows=self.num_rows,
            num_steps=self.num_steps,
            lr=0.1,
        )

    def contestants(self) -> Mapping[str, Contestant]:
        """Returns who takes part."""
        return variants.chosen(
            *variants.PEERS,
            variants.EAGER,
            variants.COMPILED,
            variants.SQRT,
            variants.SQRT_COMPILED,
            variants.STEP_WISE,
            variants.STEP_WISE_COMPILED,
            *variants.IN_JAX,
            variants.PLAIN,
        )

    def targets(self) -> tuple[Target, ...]:
        """Returns the ratios to be reached; where no whole graph fits, an absolute bound on memory."""
        if self.num_steps > _FOR_GRAPHS:
            return (Target(contestant=variants.SQRT, quantity="memory", against="bytes", at_most=_GIB),)
        return (
            Target(contestant=variants.EAGER, quantity="time", against="peers", at_most=1.05),
            Target(contestant=variants.STEP_WISE_COMPILED, quantity="time", against="peers", at_most=1.15),
            Target(contestant=variants.STEP_WISE, quantity="memory", against="peers", at_most=1 / 8),
            Target(contestant=variants.SQRT, quantity="time", against="peers", at_most=1.6),
            Target(contestant=variants.SQRT, quantity="memory", against="peers", at_most=1 / 8),
            Target(contestant=variants.SQRT_COMPILED, quantity="time", against="peers", at_most=1.6),
            Target(contestant=variants.SQRT_COMPILED, quantity="memory", against="peers", at_most=1 / 8),
            *(
                Target(contestant=variants.COMPILED, quantity="time", against=name, at_most=0.8)
                for name in variants.IN_JAX
            ),
        )

    def tiny(self) -> LargeUnroll:
        """Returns the same work in sizes that take no time."""
        return replace(self, num_steps=4, num_rows=6, features=8, hidden=5)
