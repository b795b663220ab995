"""Where a search starts: the greedy portfolio, the best of the nearest data sets, and what is lost by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from tests.helpers.problems import normal


def reached(losses: Tensor, columns: tuple[int, ...]) -> float:
    return float(losses[:, list(columns)].min(dim=1).values.mean())


@pytest.mark.parametrize("seed", range(8))
def test_each_member_of_a_portfolio_is_the_best_addition(seed: int) -> None:
    losses = normal(5, 7, seed=seed)
    chosen = ht.search.greedy_portfolio(losses, 7)
    assert sorted(chosen) == list(range(7))
    for place, member in enumerate(chosen):
        before = tuple(chosen[:place])
        others = {c: reached(losses, (*before, c)) for c in range(7) if c not in before}
        assert others[member] == pytest.approx(min(others.values()))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_portfolio_has_the_guarantee_against_all_portfolios(seed: int, count: int) -> None:
    losses = normal(6, 8, seed=seed).exp()
    worst = float(losses.max())
    best = min(reached(losses, columns) for columns in combinations(range(8), count))
    found = reached(losses, tuple(ht.search.greedy_portfolio(losses, count)))
    assert worst - found >= (1 - 1 / math.e) * (worst - best)
    if count == 1:
        assert found == pytest.approx(best)


def test_a_portfolio_is_greedy_and_not_the_best_on_average() -> None:
    # The two best on average do well on the same data set; the second member must serve the other.
    losses = torch.tensor([[0.0, 0.1, 3.0], [2.0, 2.0, 1.0]])
    assert losses.mean(dim=0).argsort().tolist()[:2] == [0, 1]
    assert ht.search.greedy_portfolio(losses, 2) == [0, 2]


def test_nearest_best_by_hand() -> None:
    losses = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 0.0, 1.0], [0.0, 3.0, 1.0, 2.0]])
    # Nearest first: sets 1, 0, 2, whose best are 2, 0 and 0 again; then their second best: 3, 1 and 2.
    assert ht.search.nearest_best(torch.tensor([0.5, 0.1, 0.7]), losses, 4) == [2, 0, 3, 1]
    assert ht.search.nearest_best(torch.tensor([0.5, 0.9, 0.7]), losses, 1) == [0]


def test_regrets_by_hand() -> None:
    losses = torch.tensor([3.0, 1.0, 2.0, 1.5])
    found = ht.search.regrets(losses, [2, 0, 3, 1])
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0.5, 0.0]))


TABLE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ht.search.greedy_portfolio(TABLE, 4), "`count` is 4"),
        (lambda: ht.search.greedy_portfolio(TABLE, 0), "`count` is 0"),
        (lambda: ht.search.greedy_portfolio(TABLE, True), "`count` is True"),
        (lambda: ht.search.greedy_portfolio(TABLE * torch.nan, 1), "`losses` holds NaN"),
        (lambda: ht.search.greedy_portfolio(TABLE.long(), 1), "dtype torch.int64"),
        (lambda: ht.search.nearest_best(torch.ones(3), TABLE, 1), r"`distances` has the shape \(3,\)"),
        (lambda: ht.search.nearest_best(torch.tensor([1.0, torch.nan]), TABLE, 1), "1 of its entries are NaN"),
        (lambda: ht.search.nearest_best(torch.ones(2), TABLE, 4), "`count` is 4"),
        (lambda: ht.search.nearest_best(torch.ones(2), TABLE * torch.inf, 1), "`losses` holds NaN or infinity"),
        (lambda: ht.search.regrets(TABLE[0], []), r"`order` is \[\]"),
        (lambda: ht.search.regrets(TABLE[0], [0, 0]), r"`order` is \[0, 0\]"),
        (lambda: ht.search.regrets(TABLE[0], [-1]), r"`order` is \[-1\]"),
        (lambda: ht.search.regrets(TABLE[0] * torch.nan, [0]), "`losses` holds NaN"),
    ],
)
def test_what_cannot_work_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
