"""Successive halving and Hyperband: how many trials run how far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hypertorch.checks.argument_types import typed


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """One run of successive halving: `sizes[i]` trials run up to `steps[i]` outer steps, and the best of them go on.

    Args:
        sizes: trials at each rung, falling.
        steps: where each rung ends, counted from the start of a trial (unit: outer steps), rising.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def continued_steps(self) -> int:
        """Outer steps of all trials if each rung goes on from the one before."""
        before = (0, *self.steps[:-1])
        return sum(size * (end - start) for size, start, end in zip(self.sizes, before, self.steps, strict=True))

    @property
    def restarted_steps(self) -> int:
        """Outer steps of all trials if each rung starts anew."""
        return sum(size * end for size, end in zip(self.sizes, self.steps, strict=True))


@typed("num_trials", "min_steps", "max_steps", "eta")
def successive_halving(num_trials: int, min_steps: int, max_steps: int, eta: int) -> Bracket:
    """Returns the bracket in which `num_trials` start, and one in `eta` goes on from each rung.

    Their number is rounded down, but never to 0.

    Args:
        num_trials: how many start, at least 1.
        min_steps: the first rung (unit: outer steps).
        max_steps: the last rung, `min_steps` times a power of `eta`.
        eta: the reduction, at least 2.

    Raises:
        ValueError: if a number is out of range, or `max_steps` is no rung.

    References:
        Jamieson and Talwalkar (2016), Non-stochastic best arm identification and hyperparameter optimization.
    """
    if num_trials < 1:
        raise ValueError(f"`num_trials` is {num_trials}: none would start. Pass at least 1.")
    steps = rungs(min_steps, max_steps, eta)
    return Bracket(sizes=tuple(max(num_trials // eta**rung, 1) for rung in range(len(steps))), steps=steps)


@typed("min_steps", "max_steps", "eta")
def hyperband(min_steps: int, max_steps: int, eta: int) -> list[Bracket]:
    """Returns the brackets of Hyperband, that with the most trials first.

    With `s_max = log_eta(max_steps / min_steps)`, bracket `s = s_max, ..., 0` starts
    `ceil((s_max + 1) eta^s / (s + 1))` trials with `max_steps / eta^s` steps.

    Args:
        min_steps: the lowest first rung (unit: outer steps).
        max_steps: the last rung, `min_steps` times a power of `eta`.
        eta: the reduction, at least 2.

    Raises:
        ValueError: if a number is out of range, or `max_steps` is no rung.

    References:
        Li et al. (2018), Hyperband: a novel bandit-based approach to hyperparameter optimization, algorithm 1.
    """
    last = len(rungs(min_steps, max_steps, eta)) - 1
    return [
        successive_halving(math.ceil((last + 1) * eta**s / (s + 1)), min_steps * eta ** (last - s), max_steps, eta)
        for s in range(last, -1, -1)
    ]


def rungs(min_steps: int, max_steps: int, eta: int) -> tuple[int, ...]:
    """Returns `min_steps`, `min_steps * eta`, ..., `max_steps`.

    Raises:
        ValueError: if a number is out of range, or `max_steps` is no rung.
    """
    if min_steps < 1 or eta < 2 or max_steps < min_steps:
        raise ValueError(
            f"`min_steps` is {min_steps}, `max_steps` {max_steps} and `eta` {eta}: there are no rungs between them. "
            "Pass `min_steps` of at least 1, `eta` of at least 2, and `max_steps` of at least `min_steps`."
        )
    steps = [min_steps]
    while steps[-1] < max_steps:
        steps.append(steps[-1] * eta)
    if steps[-1] != max_steps:
        raise ValueError(
            f"`min_steps` is {min_steps} and `eta` {eta}, whose rungs {', '.join(map(str, steps))} leave out the "
            f"length {max_steps} of the run: the last rung would be another. Let the length be {steps[-2]} or "
            f"{steps[-1]}, or change `min_steps` or `eta`."
        )
    return tuple(steps)


def kept(values: Sequence[float], size: int, *, maximise: bool) -> list[int]:
    """Returns the positions of the best values; of equal ones the first.

    Args:
        values: one for each trial.
        size: how many are kept.
        maximise: whether larger is better.
    """
    return sorted(sorted(range(len(values)), key=lambda at: -values[at] if maximise else values[at])[:size])
