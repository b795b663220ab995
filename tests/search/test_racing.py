"""Which trials leave a race: SciPy's own paired test, its limits, and the share of equal trials that leave."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hypertorch.search import is_worse


@pytest.mark.parametrize("maximise", [True, False])
def test_it_is_the_paired_test_of_scipy(maximise: bool) -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(200):
        best = generator.normal(size=4)
        values = best + generator.normal(0.5, 0.5, size=4)
        side = "less" if maximise else "greater"
        expected = stats.ttest_rel(values, best, alternative=side).pvalue < 0.05
        found.append(is_worse(values.tolist(), best.tolist(), maximise=maximise))
        assert found[-1] == expected
    assert (not any(found)) if maximise else any(found)


def test_one_seed_says_nothing_and_equal_differences_everything() -> None:
    assert not is_worse([9.0], [0.0], maximise=False)
    assert is_worse([2.0, 3.0], [1.0, 2.0], maximise=False)
    assert not is_worse([2.0, 3.0], [1.0, 2.0], maximise=True)
    assert not is_worse([1.0, 2.0], [1.0, 2.0], maximise=False)


def test_seeds_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`values` has 2 and `best` 1 seeds.*at the same seeds"):
        is_worse([1.0, 2.0], [1.0], maximise=True)


def test_equal_trials_leave_as_rarely_as_the_level_says() -> None:
    generator = np.random.default_rng(1)
    pairs = generator.normal(size=(4000, 2, 5))
    share = np.mean([is_worse(list(a), list(b), maximise=True) for a, b in pairs])
    assert share == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 4000) ** 0.5)
