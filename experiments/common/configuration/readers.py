"""Readers of single settings: each returns the value of a setting, or refuses it and says what to write."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.typed_settings import Reader

_Value = TypeVar("_Value")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_DEVICES = ("cpu", "cuda", "auto")


def switch(config: DictConfig, key: str) -> bool:
    """Returns a setting that is true or false.

    Raises:
        ExpectedFailure: if it is neither.
    """
    value = OmegaConf.select(config, key)
    if not isinstance(value, bool):
        raise ExpectedFailure(f"`{key}` is {value!r}, but it is a switch. Use true or false.")
    return value


def optional(reader: Reader[_Value]) -> Reader[_Value | None]:
    """Returns a reader that returns None for a setting that is null."""

    def read(config: DictConfig, key: str) -> _Value | None:
        return None if OmegaConf.select(config, key) is None else reader(config, key)

    return read


def text(config: DictConfig, key: str) -> str:
    """Returns a setting as it is spelt, such as a path."""
    return str(OmegaConf.select(config, key, throw_on_missing=True))


def as_given(config: DictConfig, key: str) -> Any:
    """Returns a setting that is checked by what it is handed to."""
    return OmegaConf.select(config, key)


def whole_number(config: DictConfig, key: str, *, minimum: int, purpose: str, maximum: int | None = None) -> int:
    """Returns a whole number of the configuration.

    Args:
        config: the configuration.
        key: dotted name of the setting.
        minimum: the smallest allowed.
        purpose: what the number is for, a clause of the message.
        maximum: the largest allowed; None for any.

    Raises:
        ExpectedFailure: if it is anything else.
    """
    value = OmegaConf.select(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ExpectedFailure(
            f"`{key}` is {value!r}, but {purpose}, so a whole number of at least {minimum} is needed. Write "
            f"for example {key}={max(minimum, 1)}."
        )
    if maximum is not None and value > maximum:
        raise ExpectedFailure(
            f"`{key}` is {str(value)[:40]}, but {purpose}, so a whole number of at most {maximum} is needed. Write for "
            f"example {key}={max(minimum, 1)}."
        )
    return value


# Generators are seeded by 64 bits: a larger number would be that of another seed.
seed_number = partial(whole_number, minimum=0, maximum=2**63 - 1)
# Memory is set aside for each thread, so that a billion ends the process; no machine has more cores.
thread_count = partial(whole_number, minimum=1, maximum=1024, purpose="it is the number of threads of PyTorch")


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


def device(config: DictConfig, key: str) -> torch.device:
    """Returns the device that a setting names.

    Raises:
        ExpectedFailure: if it names none, or there is no GPU.
    """
    name = one_of(config, key, _DEVICES)
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ExpectedFailure(
            f"`{key}` is 'cuda', but PyTorch finds no GPU here (or was installed without CUDA). Use {key}=cpu, or "
            f"{key}=auto for a GPU where there is one."
        )
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def dtype(config: DictConfig, key: str) -> torch.dtype:
    """Returns the floating-point type that a setting names.

    Raises:
        ExpectedFailure: if it names none.
    """
    return _DTYPES[one_of(config, key, tuple(_DTYPES))]


def inner_dtype(config: DictConfig, key: str) -> torch.dtype | None:
    """Returns the type of the inner loss's products that a setting names; None for that of everything else.

    Raises:
        ExpectedFailure: if it names another type than bfloat16.
    """
    if OmegaConf.select(config, key) is None:
        return None
    one_of(config, key, ("bfloat16",))
    return torch.bfloat16


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


def package_names(config: DictConfig, key: str) -> list[str]:
    """Returns the packages that a setting names, whose classes the configuration of a run's folder may name.

    Raises:
        ExpectedFailure: if it names none, or what cannot be a package.
    """
    names = listed_names(config, key, example="my_package") or []
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ExpectedFailure(
                f"`{key}` lists {name!r}, which cannot be the name of a package. Write it as in an import: "
                f"{key}=[my_package]."
            )
    return names


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


def quoted(known: Iterable[str]) -> str:
    """Returns names for a message, in quotes: some contain commas."""
    return ", ".join(repr(name) for name in known)
