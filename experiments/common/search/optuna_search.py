"""Searches of Optuna, an optional package, for the minimum of a function on the unit cube."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from experiments.common.commands.failures import ExpectedFailure

SamplerName: TypeAlias = Literal["TPE", "GP-EI"]
"""The tree-structured Parzen estimator, or a Gaussian process with the (logarithm of the) expected improvement."""

_STARTS = 5  # random queries before a model is used


def optuna(setting: str) -> ModuleType:
    """Returns the package.

    Args:
        setting: what asks for it, for the message.

    Raises:
        ExpectedFailure: if it is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ExpectedFailure(
            f"`{setting}` asks for searches of Optuna, which cannot be imported ({error}). Install it by "
            f"`.venv/bin/python -m pip install -c scripts/constraints.txt -e '.[search]'`, or write {setting}=null."
        ) from error


def search(
    name: SamplerName,
    function: Callable[[Tensor], float],
    dimension: int,
    queries: int,
    *,
    seed: int,
    start: Tensor | None = None,
) -> list[float]:
    """Returns the values at the queries of a search, in their order.

    Args:
        name: which search.
        function: from a place, shape `(dimension,)`, to its value.
        dimension: of the cube.
        queries: how many.
        seed: of the search, below 2 ** 32.
        start: the first query, shape `(dimension,)`; None for a random one.
    """
    package = optuna("search")
    package.logging.set_verbosity(package.logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=package.exceptions.ExperimentalWarning)
        if name == "TPE":
            sampler = package.samplers.TPESampler(n_startup_trials=_STARTS, seed=seed)
        else:
            sampler = package.samplers.GPSampler(n_startup_trials=_STARTS, seed=seed, deterministic_objective=True)
    study = package.create_study(sampler=sampler)
    if start is not None:
        study.enqueue_trial({f"x{axis}": value for axis, value in enumerate(start.tolist())})
    for _ in range(queries):
        trial = study.ask()
        place = [trial.suggest_float(f"x{axis}", 0.0, 1.0) for axis in range(dimension)]
        study.tell(trial, function(torch.tensor(place, dtype=torch.float64)))
    return [trial.value for trial in study.trials]
