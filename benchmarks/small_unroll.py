"""A small network, trained for long, with a weight for every training example."""

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


@dataclass(frozen=True, kw_only=True)
class SmallUnroll(Work):
    """An MLP, 20-32-10 by default: a step is so small that what a library does around it is what counts.

    Args:
        num_steps: inner steps.
        num_rows: training examples.
        features: numbers per row.
        hidden: width of the hidden layer.
        classes: outputs.
    """

    num_steps: int = 500
    num_rows: int = 100
    features: int = 20
    hidden: int = 32
    classes: int = 10

    @property
    def title(self) -> str:
        """What is computed."""
        widths = f"{self.features}-{self.hidden}-{self.classes}"
        return f"MLP {widths}, {self.num_rows} rows, {self.num_steps} steps, example weights"

    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data."""
        return weighted_examples(
            Source.seeded(seed, device, dtype),
            mlp(self.features, self.hidden, self.classes),
            features=self.features,
            classes=self.classes,
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
            variants.STEP_WISE,
            variants.STEP_WISE_COMPILED,
            variants.SQRT,
            *variants.IN_JAX,
            variants.PLAIN,
        )

    def targets(self) -> tuple[Target, ...]:
        """Returns the ratios to be reached."""
        return (
            Target(contestant=variants.EAGER, quantity="time", against="peers", at_most=1.05),
            Target(contestant=variants.COMPILED, quantity="time", against="peers", at_most=0.5),
            Target(contestant=variants.COMPILED, quantity="time", against=variants.JAX, at_most=1.2),
            Target(contestant=variants.COMPILED, quantity="time", against=variants.JAX_REMAT, at_most=2.5),
        )

    def tiny(self) -> SmallUnroll:
        """Returns the same work in sizes that take no time."""
        return replace(self, num_steps=4, num_rows=6, hidden=4)
