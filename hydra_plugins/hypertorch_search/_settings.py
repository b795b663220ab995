"""Which settings of a search go together."""

from __future__ import annotations

from optuna.distributions import CategoricalDistribution, IntDistribution

from hydra_plugins.hypertorch_search._space import Space
from hydra_plugins.hypertorch_search.config import SearchConfig
from hypertorch.search.samplers import NUMBERS_ONLY, SAMPLERS

_TABLES = {
    "settings": "{n_startup_trials: 5}",
    "params": "{seed: '0,1,2'}",
    "conditions": "{dynamics.lr: dynamics=sgd}",
}
PRUNERS = ("successive_halving", "hyperband")


def check_tables(settings: SearchConfig) -> None:
    """Checks that the tables among the settings are tables.

    Raises:
        ValueError: naming the one that is not.
    """
    for name, example in _TABLES.items():
        value = getattr(settings, name)
        if value is not None and not isinstance(value, dict):
            raise ValueError(
                f"`hydra.sweeper.{name}` is {value!r}, but it is a table. Write for example "
                f"'hydra.sweeper.{name}={example}'."
            )


def check_settings(settings: SearchConfig, space: Space) -> None:
    """Checks what can be checked before a configuration is composed.

    Raises:
        ValueError: naming the setting, its value and what to write instead.
    """
    for name, known in (("sampler", SAMPLERS), ("pruner", (None, *PRUNERS))):
        value = getattr(settings, name)
        if value not in known:
            raise ValueError(
                f"`hydra.sweeper.{name}` is {value!r}, which is not among the choices. Use one of: "
                f"{', '.join('null' if one is None else one for one in known)}."
            )
    for name, least in (("n_jobs", 1), ("seeds", 1), ("num_trials", 1), ("min_steps", 1), ("eta", 2), ("seed", 0)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(
                f"`hydra.sweeper.{name}` is {value}, but it is a whole number of at least {least}. Write for example "
                f"hydra.sweeper.{name}={max(least, 1)}."
            )
    _check_space(settings, space)
    _check_number(settings)
    _check_starts(settings)
    _check_early_ends(settings)
    _check_objectives(settings)


def _check_space(settings: SearchConfig, space: Space) -> None:
    if not space.distributions:
        raise ValueError(
            "`hydra/sweeper` is search, but no setting has several values: there is nothing to search. Give one a "
            "range, such as 'outer_optimizer.lr=tag(log,interval(1e-4,1e-1))', or values, such as seed=0,1,2."
        )
    if settings.sampler not in NUMBERS_ONLY:
        return
    for name, distribution in space.distributions.items():
        is_choice = isinstance(distribution, CategoricalDistribution)
        if settings.sampler == "observer" and isinstance(distribution, IntDistribution):
            raise ValueError(
                f"`hydra.sweeper.sampler` is 'observer', which moves in small steps, but `{name}` takes whole numbers: "
                "it would be drawn at random. Use hydra.sweeper.sampler=tpe or gp."
            )
        if is_choice or name in space.conditions:
            raise ValueError(
                f"`hydra.sweeper.sampler` is {settings.sampler!r}, which places numbers, but `{name}` is "
                f"{'a choice' if is_choice else 'searched under a condition'}: it would be drawn at random. Use "
                "hydra.sweeper.sampler=tpe, which takes both."
            )
    if settings.sampler == "cmaes" and len(space.distributions) < 2:
        raise ValueError(
            f"`hydra.sweeper.sampler` is 'cmaes', but {next(iter(space.distributions))!r} alone is searched: it has no "
            "covariance, and Optuna would draw it at random. Use hydra.sweeper.sampler=tpe or gp."
        )


def _check_number(settings: SearchConfig) -> None:
    own = {"grid": "every point once", "hyperband": "the trials of all brackets"}
    chosen = settings.sampler if settings.sampler == "grid" else settings.pruner
    if chosen in own and settings.num_trials is not None:
        raise ValueError(
            f"`hydra.sweeper.num_trials` is {settings.num_trials}, but {chosen} runs {own[chosen]}: the number would "
            "have no effect. Leave it out."
        )
    if chosen not in own and settings.num_trials is None:
        raise ValueError(
            "`hydra.sweeper.num_trials` is not given: the search would have no end. Write for example "
            "hydra.sweeper.num_trials=40."
        )


def _check_starts(settings: SearchConfig) -> None:
    if settings.starts is None:
        return
    if not isinstance(settings.starts, list):
        raise ValueError(
            f"`hydra.sweeper.starts` is {settings.starts!r}, but it is a list of points. Write for example "
            "'hydra.sweeper.starts=[{outer_optimizer.lr:0.1}]'."
        )
    if settings.sampler == "grid":
        raise ValueError(
            "`hydra.sweeper.starts` has points to begin with, but grid runs every point: they would have no effect. "
            "Leave it out."
        )
    if settings.num_trials is not None and len(settings.starts) > settings.num_trials:
        raise ValueError(
            f"`hydra.sweeper.starts` has {len(settings.starts)} points, more than `hydra.sweeper.num_trials` = "
            f"{settings.num_trials}: some would not be run. Raise the number."
        )


def _check_early_ends(settings: SearchConfig) -> None:
    if settings.pruner is None:
        for name in ("min_steps", "eta"):
            if getattr(settings, name) is not None:
                raise ValueError(
                    f"`hydra.sweeper.{name}` is {getattr(settings, name)}, but `hydra.sweeper.pruner` is null: it "
                    "would have no effect. Write hydra.sweeper.pruner=hyperband, or leave it out."
                )
    elif settings.min_steps is None:
        raise ValueError(
            f"`hydra.sweeper.pruner` is {settings.pruner!r}, but `hydra.sweeper.min_steps` is not given: the first "
            "rung is not known. Write for example hydra.sweeper.min_steps=10."
        )
    elif settings.sampler == "grid" or settings.seeds > 1:
        other = "sampler=grid" if settings.sampler == "grid" else f"seeds={settings.seeds}"
        raise ValueError(
            f"`hydra.sweeper.pruner` is {settings.pruner!r}, and hydra.sweeper.{other} is given: a trial would end "
            "early by one and be repeated by the other. Leave one of them out."
        )
    if settings.racing and settings.seeds < 2:
        raise ValueError(
            "`hydra.sweeper.racing` is True, but `hydra.sweeper.seeds` is 1: there are no seeds to compare trials "
            "over. Write for example hydra.sweeper.seeds=5."
        )


def _check_objectives(settings: SearchConfig) -> None:
    names = settings.objectives
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"`hydra.sweeper.objectives` is {names}, but it lists what is searched for, each once. Write for example "
            "hydra.sweeper.objectives=[validation]."
        )
    if settings.directions is not None and len(settings.directions) != len(names):
        raise ValueError(
            f"`hydra.sweeper.directions` is {settings.directions} for the objectives {names}: each needs one. Write "
            "max or min for each, in their order."
        )
    for direction in settings.directions or ():
        if direction not in ("max", "min"):
            raise ValueError(
                f"`hydra.sweeper.directions` lists {direction!r}, which does not say what is better. Use max or min."
            )
    if len(names) == 1:
        return
    for name, value in (("sampler", settings.sampler), ("pruner", settings.pruner), ("racing", settings.racing)):
        if value in ("cmaes", "observer") or (name != "sampler" and value):
            raise ValueError(
                f"`hydra.sweeper.{name}` is {value!r}, which goes by one number, but `hydra.sweeper.objectives` is "
                f"{names}. Name one objective, or use hydra.sweeper.sampler=nsga2 without a pruner and racing."
            )
