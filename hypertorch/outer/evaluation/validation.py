"""Validation during an outer run: which outer variables were the best so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import is_count
from hypertorch.outer.evaluation.report import Report
from hypertorch.problem import ProblemSource


@dataclass(frozen=True, kw_only=True, eq=False)
class Validation:
    """When and on what an outer run is validated, and what counts as better.

    Every validation uses the same episodes, `source.at(0)`, `source.at(1)`, ..., so that two validations differ by the
    outer variables only.

    Args:
        source: where the episodes come from: classes used neither in training nor in the final evaluation.
        every: outer steps between two validations, at least 1; there is one at the end as well.
        num_episodes: episodes in each.
        metric: the figure that decides: a metric of the problem, or "outer_loss".
        mode: "max" if a larger figure is better, else "min".

    Raises:
        ValueError: if `every` or `num_episodes` is below 1, or `mode` is another word.
        TypeError: if `source` is no `ProblemSource`.
    """

    source: ProblemSource
    every: int
    num_episodes: int
    metric: str = "accuracy"
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        check_fields(self, "metric")
        if not isinstance(self.source, ProblemSource):
            raise TypeError(
                f"`source` of `Validation` is a {type(self.source).__name__}, not a `ProblemSource`: there would be no "
                "problems to validate on. Pass `learner.on(episodes)` or a `BilevelProblem`."
            )
        for name, value in (("every", self.every), ("num_episodes", self.num_episodes)):
            if not is_count(value):
                raise ValueError(
                    f"`{name}` of `Validation` is {value!r}: nothing would be validated. Pass a whole number of at "
                    "least 1, or leave `validation` out."
                )
        if self.mode not in ("max", "min"):
            raise ValueError(
                f"`mode` of `Validation` is {self.mode!r}, which does not say what is better. Use 'max' (accuracy) or "
                "'min' (a loss)."
            )

    def figure(self, report: Report) -> float:
        """Returns the figure that decides.

        Raises:
            ValueError: if the problem does not report it.
        """
        if self.metric not in report.metrics:
            raise ValueError(
                f"`metric` of `Validation` is {self.metric!r}, which the problem does not report; it has "
                f"{sorted(report.metrics)}. Name one of these, or return it from `OuterProblem.metrics`."
            )
        return report.metrics[self.metric].mean

    def improves(self, value: float, best: float | None) -> bool:
        """Returns whether a figure is strictly better than the best so far; NaN never is."""
        # NaN alone differs from itself. As the first figure it must not become a best that nothing is better than.
        if value != value or best is None:
            return value == value
        return value > best if self.mode == "max" else value < best
