"""The hypergradient by hypertorch, by any of its backends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import hypertorch as ht
from benchmarks.contestant import Contestant, NotMeasured, Outcome, Side
from benchmarks.job import Job, MakeDynamics

_NOT_COMPILED = "`compile=True`"
Figures = Callable[[Job, ht.HypergradientResult], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Ours(Contestant):
    """`ht.hypergradient` with a backend.

    Args:
        backend: makes the backend; only called when run, so that a backend that this version has not is a row of its
            own and not the end of the benchmark.
        dynamics: makes the inner optimiser; None for the job's own gradient descent.
        compiles: whether the first run compiles.
        figures: what to read off the result, beside the hypergradient.
    """

    backend: Callable[[], ht.Hypergradient]
    dynamics: MakeDynamics | None = None
    compiles: bool = False
    figures: Figures | None = None
    side: Side = field(default="ours", init=False)

    @property
    def library(self) -> str:
        """The library's name in the table."""
        return "hypertorch"

    def prepares(self, job: Job) -> bool:
        """Returns whether the first run compiles, or measures which way to run tasks is the faster."""
        return self.compiles or job.num_tasks is not None

    def run(self, job: Job) -> Outcome:
        """Returns the hypergradient.

        Raises:
            NotMeasured: if what is to be compiled cannot be.
        """
        problem = job.problem(self.dynamics)
        with warnings.catch_warnings():
            # What the library would run without compilation is no measurement of the compiled variant.
            warnings.filterwarnings("error", message=_NOT_COMPILED)
            try:
                result = ht.hypergradient(problem, job.hparams, backend=self.backend())
            except UserWarning as warning:
                raise NotMeasured(str(warning)) from warning
        return Outcome(grads=result.grads, figures={} if self.figures is None else self.figures(job, result))
