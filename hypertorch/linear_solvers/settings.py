"""Checks of settings that several solvers have."""

from __future__ import annotations

import math


def check_not_negative(owner: str, name: str, value: float, advice: str) -> None:
    """Raises `ValueError` unless a setting is a finite number, at least 0."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"`{name}` of `{owner}` is {value!r}, not a finite number of at least 0. {advice}")


def check_positive(owner: str, name: str, value: float, advice: str) -> None:
    """Raises `ValueError` unless a setting is a finite number above 0."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"`{name}` of `{owner}` is {value!r}, not a finite number above 0. {advice}")


COUNT_REASON = "without one there is no solution but zero"
TOLERANCE_ADVICE = "It bounds |b - A x| / |b|; pass 0 to take all iterations, without a test of each."
DAMPING_ADVICE = "It is added to every eigenvalue; pass a small number such as 0.01, or another solver that needs none."
STEP_SIZE_ADVICE = "The iteration converges if it is below 2 / (largest eigenvalue); pass 1 for a map `I - J`."
