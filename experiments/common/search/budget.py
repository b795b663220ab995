"""A search that is stopped when its CPU time is up."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import process_time

import torch
from torch import Tensor

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.search.search_methods import SearchMethod
from experiments.common.search.search_tasks import SearchTask


class _SpentError(Exception):
    """The time is up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spent:
    """What a search did within its time.

    Args:
        points: where it evaluated, in order.
        values: what that gave, NaN where it diverged.
        seconds: from its begin to the end of each evaluation (unit: CPU seconds).
    """

    points: list[Tensor]
    values: list[float]
    seconds: list[float]

    @property
    def best(self) -> int:
        """Which evaluation had the least value.

        Raises:
            ExpectedFailure: if none of them is finite.
        """
        finite = [index for index, value in enumerate(self.values) if math.isfinite(value)]
        if not finite:
            raise ExpectedFailure(
                f"none of the {len(self.values)} evaluations that a search ended in its time is finite, so none is the "
                "best. Raise budget=..."
            )
        return min(finite, key=lambda index: self.values[index])


def spend(
    method: SearchMethod, task: SearchTask, seed: int, *, budget: float, clock: Callable[[], float] = process_time
) -> Spent:
    """Returns what a search does within its time; its own computing counts, and not only the evaluations.

    An evaluation that ends after the time is up does not count.

    Args:
        method: the search.
        task: what it minimises.
        seed: of the search.
        budget: its time (unit: CPU seconds).
        clock: the time used so far (unit: CPU seconds).
    """
    done = Spent(points=[], values=[], seconds=[])

    def evaluate(point: Tensor, with_gradient: bool) -> tuple[float, Tensor | None]:
        found = task.evaluate(point, with_gradient)
        seconds = clock() - start
        if seconds > budget:
            raise _SpentError
        done.points.append(torch.clone(point))
        done.values.append(found[0])
        done.seconds.append(seconds)
        return found

    timed = replace(task, evaluate=evaluate)
    start = clock()
    try:
        method.run(timed, sys.maxsize, seed)
    except _SpentError:
        return done
    raise AssertionError("a search ended by itself")
