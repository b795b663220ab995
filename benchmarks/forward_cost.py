"""Forward mode against reverse mode, by the number of outer variables."""

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
class ForwardCost(Work):
    """MLP 20-32-10 whose training examples share a number of weights.

    A step of forward mode costs a plain step and about two more for every outer variable, `1 + 2 n`, and its memory is
    flat in the number of steps; reverse mode costs the same for any number of outer variables.

    Args:
        num_hparams: outer variables.
        num_steps: inner steps.
        num_rows: training examples.
        hidden: width of the hidden layer.
    """

    num_hparams: int = 10
    num_steps: int = 100
    num_rows: int = 200
    hidden: int = 32

    @property
    def title(self) -> str:
        """What is computed."""
        return (
            f"MLP 20-{self.hidden}-10, {self.num_rows} rows, {self.num_steps} steps, {self.num_hparams} outer variables"
        )

    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data."""
        return weighted_examples(
            Source.seeded(seed, device, dtype),
            mlp(20, self.hidden, 10),
            features=20,
            classes=10,
            rows=self.num_rows,
            groups=self.num_hparams,
            num_steps=self.num_steps,
            lr=0.1,
        )

    def contestants(self) -> Mapping[str, Contestant]:
        """Returns who takes part: the fastest peer goes in reverse, as they all do."""
        return variants.chosen(
            variants.TORCHOPT_FUNCTIONAL, variants.HIGHER, variants.EAGER, variants.FORWARD, variants.PLAIN
        )

    def targets(self) -> tuple[Target, ...]:
        """Returns the cost line of forward mode."""
        line = 1.0 + 2.0 * self.num_hparams
        return (Target(contestant=variants.FORWARD, quantity="time", against=variants.PLAIN, at_most=line),)

    def tiny(self) -> ForwardCost:
        """Returns the same work in sizes that take no time."""
        return replace(self, num_hparams=min(self.num_hparams, 2), num_steps=4, num_rows=6, hidden=4)
