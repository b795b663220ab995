"""Momentum run backwards instead of stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

import hypertorch as ht
from benchmarks import variants
from benchmarks.contestant import Contestant
from benchmarks.data import Source, mlp
from benchmarks.job import Job
from benchmarks.ours import Ours
from benchmarks.weighted_examples import weighted_examples
from benchmarks.work import Target, Work

REVERSIBLE = "reversible"
REVERSIBLE_COMPILED = "reversible, compiled"
_LR, _MOMENTUM = 0.5, 0.9
_FEATURES = 784


@dataclass(frozen=True, kw_only=True)
class ReversibleUnroll(Work):
    """MLP 784-50-50-50-10 with momentum 0.9 on minibatches, the work of Maclaurin et al. (2015).

    Their rule scales the gradient by `1 - momentum`; `torch.optim.SGD` takes the same steps from the step size
    `(1 - momentum) lr`, which is what all but `Reversible` run.

    Args:
        num_steps: inner steps.
        batch_size: rows of a step.
        num_rows: training examples.
        hidden: width of the three hidden layers.
    """

    num_steps: int = 1000
    batch_size: int = 100
    num_rows: int = 1000
    hidden: int = 50

    @property
    def title(self) -> str:
        """What is computed."""
        widths = "-".join(str(width) for width in self._widths)
        return f"momentum {_MOMENTUM}, MLP {widths}, batches of {self.batch_size}, {self.num_steps:,} steps"

    @property
    def _widths(self) -> tuple[int, ...]:
        return (_FEATURES, self.hidden, self.hidden, self.hidden, 10)

    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data."""
        return weighted_examples(
            Source.seeded(seed, device, dtype),
            mlp(*self._widths),
            features=_FEATURES,
            classes=10,
            rows=self.num_rows,
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            lr=(1.0 - _MOMENTUM) * _LR,
            momentum=_MOMENTUM,
        )

    def contestants(self) -> Mapping[str, Contestant]:
        """Returns who takes part."""
        return {
            **variants.chosen(*variants.PEERS, variants.EAGER, variants.SQRT, variants.STEP_WISE),
            REVERSIBLE: Ours(backend=ht.hypergradients.Reversible, dynamics=_reversible, figures=_kept),
            REVERSIBLE_COMPILED: Ours(
                backend=partial(ht.hypergradients.Reversible, compile=True),
                dynamics=_reversible,
                figures=_kept,
                compiles=True,
            ),
            **variants.chosen(*variants.IN_JAX, variants.PLAIN),
        }

    def targets(self) -> tuple[Target, ...]:
        """Returns the ratios to be reached."""
        return (
            Target(contestant=REVERSIBLE, quantity="time", against=variants.PLAIN, at_most=6.0),
            Target(contestant=REVERSIBLE_COMPILED, quantity="time", against=variants.PLAIN, at_most=6.0),
            Target(contestant=REVERSIBLE, quantity="kept_bytes", against="trajectory_bytes", at_most=1 / 100),
        )

    def tiny(self) -> ReversibleUnroll:
        """Returns the same work in sizes that take no time."""
        return replace(self, num_steps=4, batch_size=3, num_rows=7, hidden=4)


def _reversible(job: Job) -> ht.Dynamics:
    return ht.dynamics.ReversibleMomentum(lr=job.lr / (1.0 - job.momentum), momentum=job.momentum)


def _kept(job: Job, result: ht.HypergradientResult) -> dict[str, float]:
    """Returns the bytes of information that the run kept, and those of the weights that a stored run would keep."""
    weights = sum(value.numel() for value in job.network.parameters())
    itemsize = next(job.network.parameters()).element_size()
    return {
        "kept_bytes": float(result.figures["information_bits"]) * weights / 8,
        "trajectory_bytes": float(job.num_steps * weights * itemsize),
    }
