"""What a search has seen, in the unit cube: values, and gradients where they are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How far above the upper quartile a value may be, in distances of the least value from it.
_OUTLIER = 30.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Observations:
    """Values of a function at points of the unit cube, with gradients at some of them.

    Args:
        points: shape `(points, dimension)`, float64.
        values: shape `(points,)`.
        gradients: shape `(points, dimension)`; a row of NaN where the gradient is not known.
        doubt: variance added to the noise of each value, in units of the standardised values, shape `(points,)`; for
            values that are assumed, not seen.
    """

    points: Tensor
    values: Tensor
    gradients: Tensor
    doubt: Tensor

    @staticmethod
    def of(points: Tensor, values: Tensor, gradients: Tensor | None = None, *, doubt: float = 0.0) -> Observations:
        """Returns observations of values, with a gradient everywhere or nowhere.

        Args:
            points: shape `(points, dimension)`.
            values: shape `(points,)`.
            gradients: shape `(points, dimension)`, or None.
            doubt: added to the noise variance of every value.
        """
        unknown = torch.full_like(points, torch.nan)
        return Observations(
            points=points,
            values=values,
            gradients=unknown if gradients is None else gradients,
            doubt=torch.full_like(values, doubt),
        )

    def __len__(self) -> int:
        return len(self.values)

    def __add__(self, other: Observations) -> Observations:
        return Observations(
            points=torch.cat([self.points, other.points]),
            values=torch.cat([self.values, other.values]),
            gradients=torch.cat([self.gradients, other.gradients]),
            doubt=torch.cat([self.doubt, other.doubt]),
        )

    @property
    def has_gradient(self) -> Tensor:
        """Which points have a gradient, shape `(points,)`."""
        return ~self.gradients.isnan().any(dim=1)

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where the values are, and where the gradients are."""
        return self.points, self.points[self.has_gradient]

    def targets(self, mean: float, deviation: float) -> Tensor:
        """Returns standardised values, then gradients, one point after the other: both are divided by `deviation`."""
        gradients = self.gradients[self.has_gradient].flatten()
        return torch.cat([self.values - mean, gradients]) / deviation

    def without_gradients(self) -> Observations:
        """Returns the values alone."""
        return Observations(
            points=self.points,
            values=self.values,
            gradients=torch.full_like(self.gradients, torch.nan),
            doubt=self.doubt,
        )

    def without_outliers(self) -> Observations:
        """Returns the same with values above `q + 30 (q - least)` lowered to that, without their gradients.

        `q` is the upper quartile. A run that nearly diverged has a value that would set the scale of all others, and a
        slope that says nothing of them.
        """
        quartile = self.values.quantile(0.75)
        most = quartile + _OUTLIER * (quartile - self.values.min())
        far = self.values > most
        gradients = torch.where(far.unsqueeze(1), torch.nan, self.gradients)
        return Observations(
            points=self.points, values=torch.minimum(self.values, most), gradients=gradients, doubt=self.doubt
        )

    def with_newest_gradients(self, most: int) -> Observations:
        """Returns at most `most` numbers: every value, and of the gradients as many of the newest as fit."""
        known = self.has_gradient.nonzero().flatten()
        room = max(most - len(self), 0) // self.points.shape[1]
        dropped = known[: max(len(known) - room, 0)]
        if not len(dropped):
            return self
        gradients = self.gradients.index_fill(0, dropped, torch.nan)
        return Observations(points=self.points, values=self.values, gradients=gradients, doubt=self.doubt)
