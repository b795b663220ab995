"""What an evaluation found: means over episodes, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rich.table import Table

_NORMAL_QUANTILE = 1.96  # 97.5 %: the convention of few-shot papers, for the usual 600 episodes close to Student's


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean of a figure over episodes.

    Attributes:
        mean: the mean.
        half_width: half the width of the 95 % interval of the mean by the normal approximation,
            `1.96 * std / sqrt(count)` with the sample standard deviation; NaN for a single episode.
        count: number of episodes.
    """

    mean: float
    half_width: float
    count: int

    @classmethod
    def from_sums(cls, *, mean: float, variance: float, count: int) -> Estimate:
        """Returns the estimate for a mean and a sample variance (with `count - 1` in its denominator)."""
        half_width = _NORMAL_QUANTILE * math.sqrt(variance / count) if count > 1 else math.nan
        return cls(mean=mean, half_width=half_width, count=count)

    def __str__(self) -> str:
        interval = "" if math.isnan(self.half_width) else f" ± {self.half_width:.4g}"
        return f"{self.mean:.5g}{interval}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures of merit over episodes; prints as one line per figure.

    Attributes:
        metrics: by name, `outer_loss` last.
        seconds: how long the evaluation took.
    """

    metrics: Mapping[str, Estimate]
    seconds: float

    def __post_init__(self) -> None:
        # Frozen too: a dataclass is, its dictionary is not.
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))

    def __str__(self) -> str:
        width = max(len(name) for name in self.metrics)
        return "\n".join(
            f"{name:<{width}}  {estimate}  ({estimate.count} episodes)" for name, estimate in self.metrics.items()
        )

    def table(self, title: str | None = None) -> Table:
        """Returns the figures as a table for `rich.print`.

        Args:
            title: a line above it.
        """
        table = Table(title=title)
        table.add_column("metric")
        for heading in ("mean", "95 % interval", "episodes"):
            table.add_column(heading, justify="right")
        for name, estimate in self.metrics.items():
            interval = "unknown" if math.isnan(estimate.half_width) else f"± {estimate.half_width:.4g}"
            table.add_row(name, f"{estimate.mean:.5g}", interval, str(estimate.count))
        return table
