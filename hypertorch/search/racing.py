"""Racing: which trials need no further seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import special

from hypertorch.checks.argument_types import typed


@typed("values", "best", "maximise", "level")
def is_worse(values: Sequence[float], best: Sequence[float], *, maximise: bool, level: float = 0.05) -> bool:
    """Returns whether a trial is worse than the best one, by a one-sided paired t-test over seeds.

    With the differences `d_i` of the values at the same seed, `t = mean(d) sqrt(n) / std(d)` is compared with Student's
    distribution with `n - 1` degrees of freedom. The test takes the differences for normal. It is repeated after every
    seed and against the best of several, so more than `level` of equal trials are eliminated.

    Args:
        values: of the trial, one for each seed.
        best: of the best trial at the same seeds.
        maximise: whether larger is better.
        level: of the test.

    Returns:
        False with fewer than two seeds: a spread takes two.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if the two are of different lengths, or `level` is no share.

    References:
        Birattari et al. (2002), A racing algorithm for configuring metaheuristics.
    """
    if len(values) != len(best):
        raise ValueError(
            f"`values` has {len(values)} and `best` {len(best)} seeds: the test compares them in pairs. Pass the "
            "values at the same seeds."
        )
    if not 0.0 < level < 1.0:
        raise ValueError(
            f"`level` is {level}: it is the share of equal trials that are given up by chance. Pass a number between 0 "
            "and 1, such as 0.05."
        )
    worse_by = np.subtract(best, values) if maximise else np.subtract(values, best)
    if len(worse_by) < 2:
        return False
    if np.ptp(worse_by) == 0.0:  # the statistic is infinite, or 0 / 0
        return bool(worse_by[0] > 0.0)
    statistic = worse_by.mean() * np.sqrt(len(worse_by)) / worse_by.std(ddof=1)
    return bool(special.stdtr(len(worse_by) - 1, -statistic) < level)
