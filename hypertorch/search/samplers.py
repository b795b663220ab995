"""The samplers of Optuna, by the names that the command line knows them under."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler


class _FromTheFirst(QMCSampler):
    """Optuna learns the space from the first trial, so that those of a first batch would all be drawn at random."""

    space: dict[str, BaseDistribution]

    def infer_relative_search_space(
        self, study: optuna.study.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.space


def _observer(**settings: Any) -> BaseSampler:
    """A process of the values of the trials so far, which proposes small moves from the best of them."""
    # It needs BoTorch, which the other samplers do not.
    return importlib.import_module("hypertorch.search").GradientSampler(**{"trusted_move": 0.2, **settings})


_CLASSES: dict[str, Callable[..., BaseSampler]] = {
    "random": RandomSampler,
    # The points of a grid wait in the study, and are taken from there before the sampler is asked.
    "grid": RandomSampler,
    "qmc": _FromTheFirst,
    "tpe": TPESampler,
    "gp": GPSampler,
    "cmaes": CmaEsSampler,
    "nsga2": NSGAIISampler,
    "observer": _observer,
}
SAMPLERS = tuple(_CLASSES)
"""The names."""

NUMBERS_ONLY = ("qmc", "cmaes", "observer")
"""Those that place numbers; a choice, or a setting under a condition, would silently be drawn at random."""


def build_sampler(
    name: str, space: Mapping[str, BaseDistribution], *, seed: int, settings: Mapping[str, Any], batch: int
) -> BaseSampler:
    """Returns a sampler.

    Args:
        name: one of `SAMPLERS`.
        space: what it draws from, by name.
        seed: of its draws, below 2 ** 32.
        settings: further arguments of its class in Optuna.
        batch: how many trials are drawn before the first of them has a value.

    Raises:
        ValueError: if the name is none of them, or its class refuses the settings.
    """
    if name not in _CLASSES:
        raise ValueError(
            f"`hydra.sweeper.sampler` is {name!r}, which is not among the choices. Use one of: {', '.join(SAMPLERS)}."
        )
    # Without it, the trials of a batch are drawn as if the others were not under way, close to each other.
    own = {"constant_liar": True} if name == "tpe" and batch > 1 else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        try:
            sampler = _CLASSES[name](seed=seed, **{**own, **settings})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`hydra.sweeper.settings` is {dict(settings)}, which the sampler {name} refuses ({error}). Write "
                "arguments of its class in optuna.samplers."
            ) from error
    if isinstance(sampler, _FromTheFirst):
        sampler.space = dict(space)
    return sampler
