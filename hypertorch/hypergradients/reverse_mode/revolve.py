"""The binomial schedule: reversing a run with few kept states and the least number of steps run again."""

from __future__ import annotations

from collections.abc import Iterator
from math import comb
from typing import NamedTuple, TypeAlias


class Keep(NamedTuple):
    """Keep the current state, which is the one before `step`."""

    step: int


class Advance(NamedTuple):
    """Run steps `start .. stop - 1` without a graph, from the current state."""

    start: int
    stop: int


class Differentiate(NamedTuple):
    """Run `step` from the current state with a graph and pull the cotangents back through it.

    With `release`, the current state is kept for the last time: drop it.
    """

    step: int
    release: bool


class Return(NamedTuple):
    """Make the kept state before `step` the current one."""

    step: int


Action: TypeAlias = Keep | Advance | Differentiate | Return


def binomial_schedule(num_steps: int, snapshots: int) -> Iterator[Action]:
    """Yields what to do, in order, to reverse a run with at most `snapshots` kept states, the first state included.

    It starts with the state before step 0 as the current one, differentiates the steps `num_steps - 1 .. 0`, and runs
    `recomputed_steps(num_steps, snapshots)` steps without a graph, the least possible. No kept state is kept twice at
    once, and every kept state is released when its own step is differentiated. The kept states are a stack: only
    the last of them is returned to or released.

    With `c` snapshots, `r` repetitions and `beta(c, r) = binomial(c + r, c)` steps can be reversed. A stretch of
    `beta(c, r - 1) < l <= beta(c, r)` steps is split where both parts need no more repetitions than that.

    Args:
        num_steps: steps to reverse (at least 1).
        snapshots: most states kept at once (at least 1).

    References:
        Griewank and Walther (2000), Algorithm 799: Revolve, section 2.
    """
    yield Keep(0)
    # Stretches of the run still to be reversed, the last on top: where it starts, where it stops, and the snapshots
    # that it may use, the kept state at its start included.
    stretches = [(0, num_steps, snapshots)]
    current = 0
    while stretches:
        start, stop, free = stretches.pop()
        if current != start:
            yield Return(start)
        while stop - start > 1 and free > 1:
            middle = start + _first_part(stop - start, free)
            yield Advance(start, middle)
            yield Keep(middle)
            # By the time that the first part is reversed, the snapshots of the second are free again.
            stretches.append((start, middle, free))
            start, free = middle, free - 1
        if stop - start > 1:
            # With one snapshot every state of the stretch is reached from its start.
            yield Advance(start, stop - 1)
            stretches.append((start, stop - 1, free))
        yield Differentiate(stop - 1, release=stop - 1 == start)
        current = stop - 1


def recomputed_steps(num_steps: int, snapshots: int) -> int:
    """Returns the least number of steps without a graph that it takes to reverse a run with a number of snapshots.

    With `l = num_steps`, `c = snapshots` and the number of repetitions `r` such that `beta(c, r-1) < l <= beta(c, r)`:

        t(l, c) = r l - beta(c + 1, r - 1),   beta(c, r) = binomial(c + r, c)

    Args:
        num_steps: steps to reverse (at least 0).
        snapshots: most states kept at once, the first one included (at least 1).

    References:
        Griewank and Walther (2000), Algorithm 799: Revolve, equations 2 and 3.
    """
    if num_steps <= 1:
        return 0
    repetitions = _repetitions(num_steps, snapshots)
    return repetitions * num_steps - _beta(snapshots + 1, repetitions - 1)


def states_alive(num_steps: int, snapshots: int) -> int:
    """Returns the most states alive at once in the schedule, for at least two steps.

    Beside the kept ones there are the state that a step starts from, the state that it ends at, as it was when the
    step was run first, and the run's last state. With many snapshots some of these are the same.
    """
    return min(snapshots + (2 if 2 * snapshots >= num_steps else 3), num_steps + 1)


def _first_part(num_steps: int, snapshots: int) -> int:
    """Returns how many steps to go before the next snapshot, the most that is optimal."""
    repetitions = _repetitions(num_steps, snapshots)
    # The rest has a snapshot less and must hold what is possible with one repetition less.
    return min(_beta(snapshots, repetitions - 1), num_steps - _beta(snapshots - 1, repetitions - 1))


def _repetitions(num_steps: int, snapshots: int) -> int:
    """Returns the least `r` with `num_steps <= beta(snapshots, r)`."""
    repetitions = 0
    while _beta(snapshots, repetitions) < num_steps:
        repetitions += 1
    return repetitions


def _beta(snapshots: int, repetitions: int) -> int:
    """Returns how many steps can be reversed with `snapshots` states, running each at most `repetitions` times."""
    return comb(snapshots + repetitions, snapshots)
