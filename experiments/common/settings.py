"""The settings that the commands themselves read, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments.common.failures import ExpectedFailure
from experiments.common.reads import Reads, check_settings_are_read

SPLITS = ("meta_train", "meta_val", "meta_test")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_DEVICES = ("cpu", "cuda", "auto")


def check_training_settings(config: DictConfig) -> None:
    """Checks the settings of a training run that no class checks.

    Raises:
        ExpectedFailure: naming the setting, its value and what to write instead.
    """
    whole_number(config, "seed", minimum=0, purpose="it chooses the initial weights and the episodes")
    whole_number(config, "outer_loop.num_outer_steps", minimum=1, purpose="it is the length of the run")
    whole_number(config, "validation.every", minimum=1, purpose="it is the outer steps between two validations")
    whole_number(config, "validation.num_episodes", minimum=1, purpose="a validation is a mean over episodes")
    whole_number(config, "evaluation.num_episodes", minimum=1, purpose="the evaluation is a mean over episodes")
    whole_number(config, "pictures.num_episodes", minimum=2, purpose="a curve is a mean over episodes, with its spread")
    for key in ("resume", "outer_loop.progress"):
        check_switch(config, key)
    chosen_splits(config)
    check_train_split(config)
    chosen_dtype(config)
    chosen_inner_dtype(config)
    chosen_device(config)


def set_threads(config: DictConfig) -> None:
    """Sets the number of threads that PyTorch computes on, where the configuration says one.

    Raises:
        ExpectedFailure: if it is no number of threads.
    """
    if config.threads is not None:
        torch.set_num_threads(whole_number(config, "threads", minimum=1, purpose="PyTorch computes on so many threads"))


def check_switch(config: DictConfig, key: str) -> None:
    """Raises `ExpectedFailure` if a setting is neither true nor false."""
    value = OmegaConf.select(config, key)
    if not isinstance(value, bool):
        raise ExpectedFailure(f"`{key}` is {value!r}, but it is a switch. Use true or false.")


def whole_number(config: DictConfig, key: str, *, minimum: int, purpose: str) -> int:
    """Returns a whole number of the configuration.

    Args:
        config: the configuration.
        key: dotted name of the setting.
        minimum: the smallest allowed.
        purpose: what the number is for, a clause of the message.

    Raises:
        ExpectedFailure: if it is anything else.
    """
    value = OmegaConf.select(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ExpectedFailure(
            f"`{key}` is {value!r}, but {purpose}, so a whole number of at least {minimum} is needed. Write "
            f"for example {key}={max(minimum, 1)}."
        )
    return value


def positive_number(config: DictConfig, key: str, *, purpose: str, example: float, or_zero: bool = False) -> float:
    """Returns a finite number above 0 of the configuration.

    Args:
        config: the configuration.
        key: dotted name of the setting.
        purpose: what the number is for, a clause of the message.
        example: one that would do, for the message.
        or_zero: whether 0 is allowed too.

    Raises:
        ExpectedFailure: if it is anything else.
    """
    value = OmegaConf.select(config, key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and not or_zero):
        raise ExpectedFailure(
            f"`{key}` is {value!r}, but {purpose}, so a finite number {'of at least' if or_zero else 'above'} 0 is "
            f"needed. Write for example {key}={example:g}."
        )
    return float(value)


def listed_names(config: DictConfig, key: str, *, example: str) -> list[str] | None:
    """Returns the names that a setting lists, where one alone needs no brackets; None if it is null.

    Args:
        config: the configuration.
        key: dotted name of the setting.
        example: a name that it may list, for the message.

    Raises:
        ExpectedFailure: if it is empty, or anything else.
    """
    value = OmegaConf.select(config, key)
    if value is None:
        return None
    given = list(value) if isinstance(value, ListConfig) else [value]
    if not given or not all(isinstance(name, str) and name for name in given):
        raise ExpectedFailure(
            f"`{key}` is {value!r}, but it lists names: at least one is needed. Write for example '{key}=[{example}]', "
            "or leave it out."
        )
    return given


def trusted_packages(config: DictConfig) -> list[str]:
    """Returns the packages that `trust` names, whose classes the configuration of a run's folder may name.

    Raises:
        ExpectedFailure: if it names none, or what cannot be a package.
    """
    names = listed_names(config, "trust", example="my_package") or []
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ExpectedFailure(
                f"`trust` lists {name!r}, which cannot be the name of a package. Write it as in an import: "
                "trust=[my_package]."
            )
    return names


def chosen_splits(config: DictConfig) -> tuple[str, ...]:
    """Returns the splits that `evaluation.splits` lists, in their own order; all where it is null.

    Raises:
        ExpectedFailure: if it lists another, or none.
    """
    # Runs of earlier versions do not have this setting.
    if config.evaluation.get("splits") is None:
        return SPLITS
    given = listed_names(config, "evaluation.splits", example=SPLITS[1]) or []
    for name in given:
        if name not in SPLITS:
            raise ExpectedFailure(
                f"`evaluation.splits` lists {name!r}, which is no split. Use some of: {', '.join(SPLITS)}."
            )
    return tuple(split for split in SPLITS if split in given)


def check_train_split(config: DictConfig) -> None:
    """Checks which classes are learned from.

    Raises:
        ExpectedFailure: if they are unknown, those of the test, or those that choose the best outer variables.
    """
    value = config.train_split
    names = value.split("+") if isinstance(value, str) else []
    if not names or not set(names) <= set(SPLITS) or len(set(names)) < len(names):
        raise ExpectedFailure(
            f"`train_split` is {value!r}, which names no classes to learn from. Use meta_train, or "
            "meta_train+meta_val for a last run."
        )
    if "meta_test" in names:
        raise ExpectedFailure(
            f"`train_split` is {value!r}: what is learned from the test classes says nothing of unseen ones. Use "
            "meta_train, or meta_train+meta_val for a last run."
        )
    if "meta_val" in names and config.validation.every < config.outer_loop.num_outer_steps:
        raise ExpectedFailure(
            f"`train_split` is {value!r}, but the best of several validations on meta_val would give the final "
            "weights: they would be chosen on classes that were learned from. Set validation.every="
            f"{config.outer_loop.num_outer_steps}, the length of the run, so that it ends with its last weights."
        )


def quoted(known: Iterable[str]) -> str:
    """Returns names for a message, in quotes: some contain commas."""
    return ", ".join(repr(name) for name in known)


def chosen_dtype(config: DictConfig) -> torch.dtype:
    """Returns the floating-point type that `dtype` names.

    Raises:
        ExpectedFailure: if it names none.
    """
    return _DTYPES[one_of(config, "dtype", tuple(_DTYPES))]


def chosen_inner_dtype(config: DictConfig) -> torch.dtype | None:
    """Returns the type of the inner loss's products that `inner_dtype` names; None for that of everything else.

    Raises:
        ExpectedFailure: if it names another type than bfloat16.
    """
    # Runs of earlier versions do not have this setting.
    if config.get("inner_dtype") is None:
        return None
    one_of(config, "inner_dtype", ("bfloat16",))
    return torch.bfloat16


def chosen_device(config: DictConfig) -> torch.device:
    """Returns the device that `device` names.

    Raises:
        ExpectedFailure: if it names none, or there is no GPU.
    """
    name = one_of(config, "device", _DEVICES)
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ExpectedFailure(
            "`device` is 'cuda', but PyTorch finds no GPU here (or was installed without CUDA). Use device=cpu, or "
            "device=auto for a GPU where there is one."
        )
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def one_of(config: DictConfig, key: str, allowed: tuple[str, ...]) -> str:
    """Returns a word of the configuration.

    Raises:
        ExpectedFailure: if it is not among the allowed.
    """
    value: Any = OmegaConf.select(config, key)
    if value not in allowed:
        raise ExpectedFailure(
            f"`{key}` is {value!r}, which is not among the choices. Use one of: {', '.join(allowed)}."
        )
    return value


def ascending_lengths(config: DictConfig, key: str, *, minimum: int = 1) -> list[int]:
    """Returns a list of numbers of steps of the configuration, sorted.

    Raises:
        ExpectedFailure: if it is anything else.
    """
    values = OmegaConf.select(config, key)
    is_list = isinstance(values, ListConfig) and len(values) > 0
    if not is_list or any(isinstance(item, bool) or not isinstance(item, int) or item < minimum for item in values):
        raise ExpectedFailure(
            f"`{key}` is {values!r}, but a list of numbers of steps is needed, each at least {minimum}. Write for "
            f"example '{key}=[10,30,100]'."
        )
    return sorted(set(values))


def prepare(config: DictConfig, reads: Reads, *, resumes: bool = False) -> None:
    """Checks the settings that every command here reads and no class checks, and applies the number of threads.

    Args:
        config: the configuration.
        reads: what the command reads of it.
        resumes: whether the command can go on with an earlier run.

    Raises:
        ExpectedFailure: naming the setting, its value and what to write instead.
    """
    check_settings_are_read(config, reads)
    whole_number(config, "seed", minimum=0, purpose="it chooses the data and the first weights")
    if resumes:
        check_switch(config, "resume")
    elif config.resume is not False:
        raise ExpectedFailure(
            f"`resume` is {config.resume!r}, but this command has nothing to go on with: it writes its results at the "
            "end. Leave it out."
        )
    chosen_device(config)
    chosen_dtype(config)
    if config.num_threads is not None:
        torch.set_num_threads(whole_number(config, "num_threads", minimum=1, purpose="operations run on so many"))
