"""What every outer loop is given, whatever it loops over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import is_count
from hypertorch.constraints import Constraint
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.outer.evaluation.validation import Validation
from hypertorch.outer.reporting.loggers import Logger
from hypertorch.outer.reporting.snapshots import Snapshots, takes_snapshots
from hypertorch.outer.steps.non_finite_steps import POLICIES, OnNonFinite
from hypertorch.outer.steps.state import OptimizerFactory, SchedulerFactory
from hypertorch.outer.storage.checkpoints import Checkpoints


@dataclass(frozen=True, kw_only=True, eq=False)
class OuterSettings:
    """The base of outer loops: how outer variables are moved, and what is kept, logged and validated of a run.

    `OuterLoop` says what each means.
    """

    optimizer: OptimizerFactory
    learning_rates: Mapping[str, float] | None = None
    scheduler: SchedulerFactory | None = None
    constraints: Mapping[str, Constraint] | None = None
    clip_norm: float | None = None
    validation: Validation | None = None
    loggers: Sequence[Logger] = ()
    log_every: int = 10
    snapshots: Snapshots | None = None
    checkpoints: Checkpoints | None = None
    progress: bool = False
    execution: Execution = DEFAULT
    on_non_finite: OnNonFinite = "raise"
    most_non_finite: int = 10

    def __post_init__(self) -> None:
        check_fields(self, "scheduler", "clip_norm", "validation", "checkpoints", "progress")
        check_kind("execution", self.execution, Execution, "for example `ht.Execution(tasks='loop')`")
        if not callable(self.optimizer):
            raise TypeError(
                f"`optimizer` is a {type(self.optimizer).__name__}, which is made already: the loop owns the outer "
                "variables and makes the optimizer of them. Pass a class with its settings bound, for example "
                "`functools.partial(torch.optim.Adam, lr=1e-3)`."
            )
        if self.learning_rates is not None:
            check_kind("learning_rates", self.learning_rates, Mapping, "for example `{'log_*': 0.1}`")
        if self.snapshots is not None:
            check_kind("snapshots", self.snapshots, Snapshots, "for example `ht.Snapshots(every=50)`")
        for pattern, rate in (self.learning_rates or {}).items():
            check_kind("learning_rates", pattern, str, "names of outer variables, or patterns, with their rates")
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 <= rate < math.inf:
                raise ValueError(
                    f"`learning_rates[{pattern!r}]` is {rate!r}: it is the step size of an outer variable. Pass a "
                    "finite number of at least 0."
                )
        if self.constraints is not None:
            check_kind("constraints", self.constraints, Mapping, "for example `{'log_*': ht.Positive()}`")
        for pattern, constraint in (self.constraints or {}).items():
            check_kind(f"constraints[{pattern!r}]", constraint, Constraint, "for example `ht.Positive()`")
        check_kind("loggers", self.loggers, Sequence, "for example `[ht.JsonLinesLogger(path)]`")
        for position, logger in enumerate(self.loggers):
            check_kind(f"loggers[{position}]", logger, Logger, "for example `ht.JsonLinesLogger(path)`")
        if self.snapshots is not None and not any(takes_snapshots(logger) for logger in self.loggers):
            raise ValueError(
                "`snapshots` is given, but none of the `loggers` takes tensors or pictures: they would be lost. Add "
                "`ht.TensorBoardLogger(folder)` or `ht.MemoryLogger()`, or leave `snapshots` out."
            )
        if self.on_non_finite not in POLICIES:
            raise ValueError(
                f"`on_non_finite` is {self.on_non_finite!r}, which names no way to go on after NaN or infinity. Use "
                "'raise', 'skip' or 'shorten'."
            )
        check_count("most_non_finite", self.most_non_finite, "outer steps that may be skipped or shortened")
        check_count("log_every", self.log_every, "outer steps between two records")
        if self.clip_norm is not None and not (self.clip_norm > 0.0 and math.isfinite(self.clip_norm)):
            raise ValueError(
                f"`clip_norm` is {self.clip_norm}: no hypergradient can be scaled to that length. Pass a finite number "
                "above 0, or None for no clipping."
            )


def check_kind(argument: str, value: object, kind: type, example: str) -> None:
    """Raises a `TypeError` unless an argument is of a kind."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{argument}` is {value!r}, not a `{kind.__name__}`: the outer loop calls the methods of that interface. "
            f"Pass {example}."
        )


def check_count(argument: str, value: object, meaning: str) -> None:
    """Raises a `ValueError` unless a value is a whole number of at least 1."""
    if not is_count(value):
        raise ValueError(f"`{argument}` is {value!r}: it counts {meaning}. Pass a whole number of at least 1.")
