"""The searches that are compared: each takes a task, a number of evaluations and a seed, and returns its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.quasirandom import SobolEngine

import hypertorch as ht
from experiments.common.search.optuna_search import search as optuna_search
from experiments.common.search.search_tasks import SearchTask

_NUM_INITIAL = 5
_ADAM_LR = 0.05  # in sides of the cube


@dataclass(frozen=True, kw_only=True)
class SearchMethod:
    """A search.

    Args:
        run: from the task, the number of evaluations and the seed to the value of each evaluation, NaN where it
            diverged.
        with_gradients: whether its evaluations compute gradients.
    """

    run: Callable[[SearchTask, int, int], list[float]]
    with_gradients: bool


def gradient_bayes(
    task: SearchTask, count: int, seed: int, *, factor: float | None = 1.0, guarded: bool = True, batch: int = 1
) -> list[float]:
    """Returns the values at the points of `ht.search.GradientBayes`.

    Args:
        task: what is minimised.
        count: evaluations.
        seed: of the search.
        factor: what the gradients are multiplied by before they are told; None to tell none.
        guarded: whether gradients that mislead are left aside.
        batch: points asked for together.
    """
    search = ht.search.GradientBayes(
        [(0.0, 1.0)] * task.dimension, num_initial=_NUM_INITIAL, guarded=guarded, seed=seed
    )
    values: list[float] = []
    while len(values) < count:
        if task.start is not None and not values:
            points = task.start.unsqueeze(0)
        else:
            points = search.ask(min(batch, count - len(values)))
        found = [task.evaluate(point, factor is not None) for point in points]
        values += [value for value, _ in found]
        gradients = None
        if factor is not None:
            gradients = factor * torch.stack([own for _, own in found if own is not None])
        search.tell(points, torch.tensor([value for value, _ in found], dtype=torch.float64), gradients)
    return values


def tree_parzen(task: SearchTask, count: int, seed: int) -> list[float]:
    """Returns the values at the points of Optuna's TPE."""

    def value(point: Tensor) -> float:
        found, _ = task.evaluate(point, False)
        # Optuna would take NaN for a failed trial and ask again.
        return found if math.isfinite(found) else 1e6

    return optuna_search("TPE", value, task.dimension, count, seed=seed, start=task.start)


def uniform(task: SearchTask, count: int, seed: int) -> list[float]:
    """Returns the values at points that are drawn uniformly, after the first one."""
    generator = torch.Generator().manual_seed(seed)
    point = _first(task, seed)
    values: list[float] = []
    while len(values) < count:
        values.append(task.evaluate(point, False)[0])
        point = torch.rand(task.dimension, generator=generator, dtype=torch.float64)
    return values


def adam(task: SearchTask, count: int, seed: int) -> list[float]:
    """Returns the values along Adam's steps from the first point, kept in the cube."""
    point = _first(task, seed)
    optimizer = torch.optim.Adam([point], lr=_ADAM_LR)
    values = []
    for _ in range(count):
        value, gradient = task.evaluate(point.clone(), True)
        values.append(value)
        # Where it diverged there is no direction, and it stays.
        point.grad = None if gradient is None else torch.nan_to_num(gradient, nan=0.0)
        optimizer.step()
        point.clamp_(0.0, 1.0)
    return values


class _SpentError(Exception):
    """The evaluations are used up."""


def lbfgs(task: SearchTask, count: int, seed: int) -> list[float]:
    """Returns the values of L-BFGS-B from the points of the Sobol sequence, from the next one where it has ended."""
    values: list[float] = []

    def objective(place: np.ndarray) -> tuple[float, np.ndarray]:
        if len(values) == count:
            raise _SpentError
        value, gradient = task.evaluate(torch.from_numpy(place.copy()), True)
        values.append(value)
        if gradient is None or not math.isfinite(value):
            return 1e6, np.zeros_like(place)
        return value, gradient.numpy()

    starts = _starts(task, seed)
    try:
        while True:
            start = starts.draw(1, dtype=torch.float64).squeeze(0).numpy()
            minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0.0, 1.0)] * task.dimension)
    except _SpentError:
        return values


def _first(task: SearchTask, seed: int) -> Tensor:
    """The point that a search begins at, which may be written to."""
    return _starts(task, seed).draw(1, dtype=torch.float64).squeeze(0) if task.start is None else task.start.clone()


def _starts(task: SearchTask, seed: int) -> SobolEngine:
    """The sequence that `GradientBayes` with the same seed begins with."""
    return SobolEngine(task.dimension, scramble=True, seed=seed)


METHODS: dict[str, SearchMethod] = {
    "gradients": SearchMethod(run=gradient_bayes, with_gradients=True),
    "values": SearchMethod(run=partial(gradient_bayes, factor=None), with_gradients=False),
    "unguarded": SearchMethod(run=partial(gradient_bayes, guarded=False), with_gradients=True),
    "a tenth": SearchMethod(run=partial(gradient_bayes, factor=0.1), with_gradients=True),
    "wrong sign": SearchMethod(run=partial(gradient_bayes, factor=-1.0), with_gradients=True),
    "batches of four": SearchMethod(run=partial(gradient_bayes, batch=4), with_gradients=True),
    "random": SearchMethod(run=uniform, with_gradients=False),
    "TPE": SearchMethod(run=tree_parzen, with_gradients=False),
    "Adam": SearchMethod(run=adam, with_gradients=True),
    "L-BFGS": SearchMethod(run=lbfgs, with_gradients=True),
}
