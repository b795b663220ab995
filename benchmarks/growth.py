"""A work whose number of parameters is given, to see how time and memory grow with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks import variants
from benchmarks.contestant import Contestant
from benchmarks.data import Source, mlp
from benchmarks.job import Job
from benchmarks.weighted_examples import weighted_examples
from benchmarks.work import Work

_FEATURES, _CLASSES = 20, 10


@dataclass(frozen=True, kw_only=True)
class ParameterGrowth(Work):
    """An MLP with two hidden layers of the width that gives about the wanted number of parameters.

    Args:
        num_params: inner parameters wanted; the nearest width is taken.
        num_steps: inner steps.
        num_rows: training examples.
    """

    num_params: int = 10_000
    num_steps: int = 10
    num_rows: int = 32

    @property
    def width(self) -> int:
        """The hidden layers' width: the root of `w^2 + (features + classes + 2) w + classes = num_params`."""
        half = (_FEATURES + _CLASSES + 2) / 2
        return max(1, round(math.sqrt(half**2 + max(self.num_params - _CLASSES, 0)) - half))

    @property
    def title(self) -> str:
        """What is computed."""
        return f"MLP of {self.num_params:,} parameters, {self.num_rows} rows, {self.num_steps} steps, example weights"

    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data."""
        return weighted_examples(
            Source.seeded(seed, device, dtype),
            mlp(_FEATURES, self.width, self.width, _CLASSES),
            features=_FEATURES,
            classes=_CLASSES,
            rows=self.num_rows,
            num_steps=self.num_steps,
            lr=0.05,
        )

    def contestants(self) -> Mapping[str, Contestant]:
        """Returns who takes part."""
        return variants.chosen(
            *variants.PEERS,
            variants.EAGER,
            variants.COMPILED,
            variants.STEP_WISE,
            variants.SQRT,
            *variants.IN_JAX,
            variants.PLAIN,
        )

    def tiny(self) -> ParameterGrowth:
        """Returns the same work in sizes that take no time."""
        return replace(self, num_params=min(self.num_params, 3000), num_steps=4, num_rows=6)
