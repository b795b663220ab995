"""Random search: its draws, its best, and what k draws are expected to give."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest

from experiments.common.search.random_search import RandomSearch, random_search


def test_the_expected_best_is_the_mean_over_all_choices() -> None:
    found = RandomSearch(draws=[{}] * 4, losses=[3.0, math.inf, 1.0, 2.0], seconds=1.0).expected_best()
    for k, value in enumerate(found, start=1):
        choices = list(product([3.0, 3.0, 1.0, 2.0], repeat=k))
        assert value == pytest.approx(sum(map(min, choices)) / len(choices))


def test_draws_lie_in_their_ranges_and_the_least_is_the_best(tmp_path: Path) -> None:
    ranges = {"a": (-1.0, 1.0), "b": (5.0, 6.0)}

    def loss(draw: dict[str, float]) -> float:
        return math.nan if draw["a"] < -0.5 else draw["a"] ** 2

    search = random_search(ranges, loss, cpu_seconds=0.02, seed=1)
    assert len(search.draws) > 20 and 0.02 <= search.seconds < 1.0
    for name, (low, high) in ranges.items():
        values = [draw[name] for draw in search.draws]
        middle = (low + high) / 2
        assert low <= min(values) < middle < max(values) <= high
    assert search.best["a"] ** 2 == min(search.losses) and max(search.losses) == math.inf
    again = random_search(ranges, loss, cpu_seconds=0.0, seed=1)
    assert again.draws == search.draws[:1]
    assert random_search(ranges, loss, cpu_seconds=0.0, seed=2).draws != again.draws
    search.plot(tmp_path / "search.png", label="loss", reached=0.1, reached_by="others")
    assert (tmp_path / "search.png").stat().st_size > 5000
