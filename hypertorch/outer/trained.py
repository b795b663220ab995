"""What an outer run found."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypertorch import tree
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Trained:
    """What an outer run found.

    Attributes:
        hparams: the outer variables after the last step.
        best_hparams: those with the best validation. Without a validation nothing is known to be better, and they are
            those after the last step, however high the outer loss rose.
        best_step: outer steps after which they were found.
        best_value: their figure of merit; None without a validation.
        num_outer_steps: outer steps done.
        seconds: run time, that of the runs it was resumed from included.
        carry: what the last hypergradient handed on, a warm-started run's inner state (`params.<name>`) for one.
        params: the inner params that a warm-started or real-time run ended at, by their own names; empty of a run whose
            outer steps each started afresh.
    """

    hparams: TensorDict
    best_hparams: TensorDict
    best_step: int
    best_value: float | None
    num_outer_steps: int
    seconds: float
    carry: TensorDict = field(default_factory=dict)

    @property
    def params(self) -> TensorDict:
        """The inner params that a warm-started run ended at."""
        return tree.without_prefix("params", self.carry)

    def __repr__(self) -> str:
        # Sizes instead of entries, once: both sets of outer variables have the same.
        steps = f"num_outer_steps={self.num_outer_steps}, seconds={self.seconds:.3g}"
        best = (
            f"best_step={self.best_step}, not validated: best_hparams are the last"
            if self.best_value is None
            else f"best_step={self.best_step}, best_value={self.best_value:.5g}"
        )
        sizes = ", ".join(f"{name}: {tuple(value.shape)}" for name, value in self.hparams.items())
        return f"Trained({steps}, {best}, hparams={{{sizes}}})"
