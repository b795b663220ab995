"""An observer moves from the best point within a box that grows with successes and shrinks with failures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hypertorch.search import GradientBayes
from hypertorch.search.trusted_box import trusted_box, trusted_length

F64 = torch.float64


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.4),
        ([3.0, 2.0], 0.4),
        ([3.0, 2.0, 1.0], 0.8),
        ([3.0, 2.0, 1.0, 0.5, 0.4, 0.3], 1.6),
        ([9.0 - k for k in range(9)], 2.0),  # no longer than the whole range both ways
        ([1.0, 2.0, 2.0, 2.0], 0.4),
        ([1.0, 2.0, 2.0, 2.0, 2.0], 0.2),  # four failures
        ([1.0, 2.0, math.nan, 2.0, math.nan], 0.2),
        ([1.0, 0.9999, 0.9998, 0.9997, 0.9996], 0.2),  # too little to count
        ([-1.0, -1.0001, -1.0002, -1.0003, -1.0004], 0.2),
        ([1.0, 2.0, 2.0, 0.5, 2.0, 2.0], 0.4),  # a success between
    ],
)
def test_the_length_follows_what_was_seen(values: list[float], expected: float) -> None:
    assert trusted_length(torch.tensor(values, dtype=F64), 0.4, 2) == pytest.approx(expected)


def test_with_more_numbers_more_failures_are_allowed() -> None:
    values = torch.tensor([1.0] + [2.0] * 6, dtype=F64)
    assert trusted_length(values, 0.4, 6) == pytest.approx(0.2)
    assert trusted_length(values, 0.4, 7) == pytest.approx(0.4)


def test_a_box_that_became_too_small_starts_again() -> None:
    # 0.4 / 2 ** 6 is below 2 ** -7; six halvings are 24 failures.
    values = torch.tensor([1.0] + [2.0] * 23, dtype=F64)
    assert trusted_length(values, 0.4, 2) == pytest.approx(0.4 / 2**5)
    assert trusted_length(torch.cat([values, values[-1:]]), 0.4, 2) == pytest.approx(0.4)


def test_the_box_is_within_the_cube() -> None:
    low, high = trusted_box(torch.tensor([0.05, 0.5, 1.0], dtype=F64), 0.2)
    torch.testing.assert_close(low, torch.tensor([0.0, 0.4, 0.9], dtype=F64))
    torch.testing.assert_close(high, torch.tensor([0.15, 0.6, 1.0], dtype=F64))


def bowl(points: torch.Tensor) -> torch.Tensor:
    return (points[:, 0] - 3.0).square() + 0.3 * (points[:, 1] / 0.02).log().square()


def test_each_move_is_within_the_box_around_the_best_and_finds_the_minimum() -> None:
    search = GradientBayes([(0.0, 4.0), (1e-3, 1e1)], log=[False, True], num_initial=3, trusted_move=0.1, seed=2)
    low, high = torch.tensor([0.0, math.log(1e-3)], dtype=F64), torch.tensor([4.0, math.log(1e1)], dtype=F64)

    def unit(point: torch.Tensor) -> torch.Tensor:
        return (torch.stack([point[0], point[1].log()]) - low) / (high - low)

    values: list[float] = []
    for number in range(24):
        point = search.ask()
        if number >= 3:
            reach = trusted_length(torch.tensor(values, dtype=F64), 0.2, 2) / 2
            moved = (unit(point[0]) - unit(search.best.point)).abs()
            assert bool((moved <= reach + 1e-9).all())
        values.append(float(bowl(point)))
        search.tell(point, bowl(point))
    assert search.best.value < 1e-2
    # Without the box the search goes further at once.
    free = GradientBayes([(0.0, 4.0), (1e-3, 1e1)], log=[False, True], num_initial=3, seed=2)
    for _ in range(3):
        point = free.ask()
        free.tell(point, bowl(point))
    assert float((unit(free.ask()[0]) - unit(free.best.point)).abs().max()) > 0.1


@pytest.mark.parametrize("move", [0.0, -0.1, 1.5, math.nan, True, "0.2"])
def test_a_move_is_a_part_of_the_range(move: Any) -> None:
    with pytest.raises(ValueError, match="`trusted_move` is .*: it is a part of the range"):
        GradientBayes([(0.0, 1.0)], trusted_move=move)
