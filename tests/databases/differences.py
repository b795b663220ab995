"""Derivatives by central differences that say how sharp they are, and whether there is one at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

_STEP_SIZES = (1e-4, 1e-5, 1e-3)


class Difference(NamedTuple):
    """A derivative by differences.

    Attributes:
        value: the derivative.
        error: bound of its error, from three step sizes and from the bend of the function at the point.
    """

    value: float
    error: float

    @property
    def is_sharp(self) -> bool:
        """Whether it can tell a derivative that is wrong in the seventh digit."""
        return self.error <= 1e-7 * abs(self.value)


def central_difference(function: Callable[[float], float]) -> Difference:
    """Returns `f'(0)` with an error bound, by the sharpest of three step sizes.

    With `D(e) = (f(e) - f(-e)) / 2e`, Richardson's `(4 D(e) - D(2e)) / 3` has an error of `e^4`; how far it is from the
    same at `2e` bounds it. Two signs tell a kink or a jump: the two extrapolations differ (a jump grows with `1/e`),
    or the second difference `f(e) - 2 f(0) + f(-e)` grows with `e` and not with its square (a kink at 0 itself, of
    which central differences give the mean slope at every step size).
    """
    here = function(0.0)
    best = Difference(math.nan, math.inf)
    for size in _STEP_SIZES:
        try:
            values = {distance: function(distance * size) for distance in (-4, -2, -1, 1, 2, 4)}
        except (RuntimeError, ValueError):  # out of the domain of the function
            continue
        slopes = {distance: (values[distance] - values[-distance]) / (2 * distance * size) for distance in (1, 2, 4)}
        near, far = (4 * slopes[1] - slopes[2]) / 3, (4 * slopes[2] - slopes[4]) / 3
        bends = {distance: values[distance] - 2 * here + values[-distance] for distance in (1, 2)}
        error = abs(near - far) + abs(bends[2] - 4 * bends[1]) / (2 * size)
        if error < best.error:
            best = Difference(near, error)
        if best.is_sharp:
            break
    return best
