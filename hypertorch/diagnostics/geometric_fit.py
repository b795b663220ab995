"""The rate at which an error falls geometrically."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FEWEST = 3  # a line through two points has no spread to judge it by
_ABOVE_FLOOR = 10.0


@dataclass(frozen=True, kw_only=True)
class GeometricFit:
    """`error ~ factor * rate ** length`.

    Attributes:
        rate: factor per step, below 1.
        factor: the error at length 0 if the law held from the start.
        num_points: points that were fitted.
        spread: root mean square of `ln(error) - ln(fit)` over them: 0.1 is a law that holds to 10 %.
    """

    rate: float
    factor: float
    num_points: int
    spread: float

    def __str__(self) -> str:
        return (
            f"falls by {self.rate:.6g} per step, from {self.factor:.3g} at none ({self.num_points} points, spread "
            f"{self.spread:.2g})"
        )


def fit_geometric(lengths: Sequence[int], errors: Sequence[float]) -> GeometricFit | None:
    """Returns the least-squares line through the logarithms of the errors; None where there is no rate.

    Errors within a factor of ten of the smallest are left out, because rounding or a linear solve may have set a floor.
    The earlier half of the others is left out too (but never the last three points), because terms that fall faster
    still show there. Fewer than three points, or a line that does not fall, give no rate.

    Args:
        lengths: ascending (unit: steps).
        errors: one for each.
    """
    above = [error for error in errors if error > 0 and math.isfinite(error)]
    # An error of zero is no floor, but a comparison with itself.
    floor = _ABOVE_FLOOR * min(above, default=math.inf)
    points = [
        (length, math.log(error))
        for length, error in zip(lengths, errors, strict=True)
        if math.isfinite(error) and error > floor
    ]
    points = points[-max(_FEWEST, math.ceil(len(points) / 2)) :]
    if len(points) < _FEWEST:
        return None
    x, y = np.array(points).T
    slope, start = np.polyfit(x, y, 1)
    if slope >= 0:
        return None
    return GeometricFit(
        rate=math.exp(slope),
        factor=math.exp(start),
        num_points=len(points),
        spread=float(np.sqrt(np.mean((y - slope * x - start) ** 2))),
    )
