"""A work over growing sizes: how time and memory grow, and where two contestants cross."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from benchmarks.row import Row

_FEWEST = 3


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a contestant's figure grows: `figure ~ factor * size^exponent`.

    Attributes:
        exponent: the fitted power.
        factor: the figure at size one, by the fit.
        first: the smallest size of the fit.
        last: the largest size of the fit.
    """

    exponent: float
    factor: float
    first: float
    last: float


def growth(rows: Iterable[Row], quantity: str) -> Growth | None:
    """Returns the power law through a contestant's figures, by least squares on logarithms; None for too few points.

    Only the larger half of the sizes is fitted (three at least), since at small sizes what does not grow is seen.

    Args:
        rows: of one contestant.
        quantity: "time" or "memory".
    """
    figures = [(row.size, row.quantity(quantity)) for row in rows]
    points = sorted((size, figure) for size, figure in figures if size is not None and figure)
    points = points[-max(_FEWEST, math.ceil(len(points) / 2)) :]
    if len({size for size, _ in points}) < _FEWEST:
        return None
    logs = np.log(np.array(points, dtype=float))
    exponent, intercept = np.polyfit(logs[:, 0], logs[:, 1], 1)
    return Growth(exponent=float(exponent), factor=float(np.exp(intercept)), first=points[0][0], last=points[-1][0])


def crossover(rows: Sequence[Row], cheap: str, dear: str, quantity: str = "time") -> float | None:
    """Returns the size at which one contestant stops being cheaper than another, interpolated on logarithms.

    Args:
        rows: of a sweep.
        cheap: the contestant that is cheaper at small sizes.
        dear: the other one.
        quantity: "time" or "memory".

    Returns:
        The size; None if they do not cross among the measured sizes.
    """
    ratios: list[tuple[float, float]] = []
    for size in sorted({row.size for row in rows if row.size is not None}):
        first, second = (_figure(rows, size, name, quantity) for name in (cheap, dear))
        if first and second:
            ratios.append((math.log(size), math.log(first / second)))
    for (size_before, before), (size_after, after) in pairwise(ratios):
        if before < 0 <= after:
            return math.exp(size_before + (size_after - size_before) * -before / (after - before))
    return None


def _figure(rows: Sequence[Row], size: int, name: str, quantity: str) -> float | None:
    return next((row.quantity(quantity) for row in rows if row.size == size and row.contestant == name), None)
