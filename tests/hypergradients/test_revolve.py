"""The binomial schedule against the optimum found by dynamic programming."""

from __future__ import annotations

from functools import cache
from math import comb

import pytest

from hypertorch.hypergradients.reverse_mode.revolve import (
    Advance,
    Differentiate,
    Keep,
    Return,
    binomial_schedule,
    recomputed_steps,
    states_alive,
)


@cache
def least_steps(num_steps: int, snapshots: int) -> int:
    """The fewest steps without a graph, by trying every place for the next snapshot."""
    if num_steps == 1:
        return 0
    if snapshots == 1:
        return num_steps * (num_steps - 1) // 2
    return min(
        first + least_steps(num_steps - first, snapshots - 1) + least_steps(first, snapshots)
        for first in range(1, num_steps)
    )


class Machine:
    """Carries a schedule out and refuses what cannot be carried out."""

    def __init__(self, num_steps: int, snapshots: int) -> None:
        self.current, self.next = 0, num_steps - 1
        self.kept: set[int] = set()
        self.advanced = self.most_kept = self.most_alive = 0
        for action in binomial_schedule(num_steps, snapshots):
            self.act(action, num_steps)
            self.most_kept = max(self.most_kept, len(self.kept))

    def act(self, action: object, num_steps: int) -> None:
        if isinstance(action, Keep):
            assert action.step == self.current and action.step not in self.kept
            self.kept.add(action.step)
        elif isinstance(action, Advance):
            assert action.start == self.current < action.stop
            self.advanced += action.stop - action.start
            self.current = action.stop
        elif isinstance(action, Return):
            assert action.step in self.kept and action.step != self.current
            self.current = action.step
        else:
            assert isinstance(action, Differentiate)
            assert action.step == self.current == self.next
            behind = {action.step + 1, num_steps} if action.step < num_steps - 1 else set()
            self.most_alive = max(self.most_alive, len(self.kept | {action.step} | behind))
            if action.release:
                self.kept.remove(action.step)
            self.next -= 1


@pytest.mark.parametrize("snapshots", [1, 2, 3, 4, 5, 7, 12, 40])
def test_the_schedule_is_sound_and_optimal(snapshots: int) -> None:
    for num_steps in range(1, 41):
        machine = Machine(num_steps, snapshots)
        assert machine.next == -1 and not machine.kept
        assert machine.most_kept == min(snapshots, num_steps)
        assert machine.advanced == least_steps(num_steps, snapshots) == recomputed_steps(num_steps, snapshots)
        if num_steps > 1:
            assert machine.most_alive == states_alive(num_steps, snapshots)


@pytest.mark.parametrize("snapshots", [1, 2, 3, 6])
@pytest.mark.parametrize("repetitions", [1, 2, 3, 5])
def test_the_formula_where_the_binomials_change(snapshots: int, repetitions: int) -> None:
    longest = comb(snapshots + repetitions, snapshots)
    exact = repetitions * longest - comb(snapshots + repetitions, snapshots + 1)
    assert recomputed_steps(longest, snapshots) == exact
    # One step more is run in one repetition more.
    assert recomputed_steps(longest + 1, snapshots) == exact + repetitions + 1


def test_known_values() -> None:
    assert recomputed_steps(10, 3) == 15
    assert [recomputed_steps(7, 1), recomputed_steps(7, 7), recomputed_steps(1, 1), recomputed_steps(0, 1)] == [
        21, 6, 0, 0,
    ]  # fmt: skip
    assert recomputed_steps(10**6, 20) < 7 * 10**6


def test_more_snapshots_never_run_more_steps() -> None:
    for num_steps in (2, 17, 100):
        counts = [recomputed_steps(num_steps, snapshots) for snapshots in range(1, num_steps + 3)]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == num_steps - 1


def test_a_small_schedule_in_full() -> None:
    assert list(binomial_schedule(4, 2)) == [
        Keep(0), Advance(0, 2), Keep(2), Advance(2, 3), Differentiate(3, False), Return(2), Differentiate(2, True),
        Return(0), Advance(0, 1), Keep(1), Differentiate(1, True), Return(0), Differentiate(0, True),
    ]  # fmt: skip
