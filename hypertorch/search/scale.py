"""From a box in the user's units to the unit cube, some axes by their logarithm, and gradients with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hypertorch.checks.values import check_switch


def check_pair(argument: str, ends: object) -> None:
    """Raises a `TypeError` unless two numbers are given."""
    pair = ends if isinstance(ends, (list, tuple)) and len(ends) == 2 else (None, None)
    if any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in pair):
        raise TypeError(
            f"`{argument}` is {ends!r}: a search has a least and a greatest value. Pass two numbers, such as "
            "(0.01, 1.0)."
        )


class Scale:
    """Maps a box to the unit cube: `u = (x - low) / (high - low)`, or the same of the logarithms.

    Args:
        bounds: least and greatest value of each axis.
        log: whether each axis is mapped by its logarithm; None for no axis.

    Raises:
        ValueError: if a bound is not finite, the bounds do not ascend, a logarithm is asked for where the lower bound
            is not above 0, or the lengths differ.
    """

    def __init__(self, bounds: Sequence[tuple[float, float]], log: Sequence[bool] | None = None) -> None:
        if not isinstance(bounds, Sequence) or not (log is None or isinstance(log, (list, tuple))):
            raise TypeError(
                f"`bounds` is a {type(bounds).__name__} and `log` a {type(log).__name__}: there is a pair of numbers, "
                "and a switch, for each axis. Pass lists, such as `[(0.0, 1.0)]` and `[False]`."
            )
        for axis, ends in enumerate(bounds):
            check_pair(f"bounds[{axis}]", ends)
        for axis, switch in enumerate(log or ()):
            check_switch(f"log[{axis}]", switch)
        log = [False] * len(bounds) if log is None else list(log)
        if len(log) != len(bounds) or not bounds:
            raise ValueError(
                f"`bounds` has {len(bounds)} axes and `log` {len(log)}: each axis has two bounds, and a switch where "
                "`log` is given. Pass at least one axis, and as many switches as axes."
            )
        for axis, ((low, high), is_log) in enumerate(zip(bounds, log, strict=True)):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(
                    f"`bounds` of axis {axis} are {low} and {high}: a search needs a finite range. Pass two finite "
                    "numbers, the lesser first."
                )
            if is_log and low <= 0.0:
                raise ValueError(
                    f"`bounds` of axis {axis} start at {low}, which has no logarithm. Start above 0, or leave the axis "
                    "out of `log`."
                )
        self._log = torch.tensor(log)
        ends = torch.tensor(bounds, dtype=torch.float64)
        self._bounds = ends
        self._low, self._high = torch.where(self._log.unsqueeze(1), ends.log(), ends).unbind(dim=1)

    @property
    def dimension(self) -> int:
        """Number of axes."""
        return len(self._log)

    @property
    def widths(self) -> Tensor:
        """Length of each axis of the box, shape `(dimension,)`."""
        return self._bounds[:, 1] - self._bounds[:, 0]

    def to_unit(self, points: Tensor) -> Tensor:
        """Returns points of the box in the unit cube, shape `(..., dimension)`."""
        # Clamped, because both branches are computed: an axis without a logarithm may hold 0 or less.
        own = torch.where(self._log, points.clamp(min=torch.finfo(torch.float64).tiny).log(), points)
        return (own - self._low) / (self._high - self._low)

    def from_unit(self, points: Tensor) -> Tensor:
        """Returns points of the unit cube in the box, shape `(..., dimension)`."""
        own = self._low + points * (self._high - self._low)
        # The exponential may round past a bound, or short of it.
        inside = torch.where(self._log, own.exp(), own).clamp(*self._bounds.unbind(dim=1))
        return torch.where(points <= 0.0, self._bounds[:, 0], torch.where(points >= 1.0, self._bounds[:, 1], inside))

    def unit_gradients(self, points: Tensor, gradients: Tensor) -> Tensor:
        """Returns gradients in the unit cube of those in the box: `df/du = df/dx (high - low)`.

        Of an axis with a logarithm it is `df/du = df/dx x (log high - log low)`.

        Args:
            points: where they were taken, in the box, shape `(..., dimension)`.
            gradients: the same shape.
        """
        stretch = torch.where(self._log, points, torch.ones_like(points))
        return gradients * stretch * (self._high - self._low)

    def check_within(self, points: Tensor) -> None:
        """Refuses points outside the box.

        Raises:
            ValueError: if a point is outside, or not finite.
        """
        slack = 1e-9 * (self._bounds[:, 1] - self._bounds[:, 0])
        within = (points >= self._bounds[:, 0] - slack) & (points <= self._bounds[:, 1] + slack)
        if not bool(within.all()):
            axis = int((~within).nonzero()[0, -1])
            raise ValueError(
                f"`points` has {points[..., axis].tolist()} along axis {axis}, whose bounds are "
                f"{self._bounds[axis].tolist()}: the search is one of the box. Tell points within it, or widen "
                "`bounds`."
            )
