"""A work from the configuration, its sizes checked: what a work cannot compute must not be found after hours."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from benchmarks.work import Work
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.readers import one_of, whole_number


def build_work(config: DictConfig, key: str) -> Work:
    """Returns the work that a block of the configuration describes.

    Args:
        config: the configuration.
        key: dotted name of the block.

    Raises:
        ExpectedFailure: if it is no work, or one of its sizes is not possible.
    """
    work = build(config, key)
    if not isinstance(work, Work):
        raise ExpectedFailure(
            f"`{key}` is a {type(work).__name__}, which is no work: there is nothing to measure. Name a class of "
            f"benchmarks, such as {key}._target_=benchmarks.SmallUnroll."
        )
    kinds = get_type_hints(type(work))
    given = OmegaConf.select(config, key)
    for name in (name for name in sizes(work) if name in given):
        if kinds[name] is int:
            whole_number(config, f"{key}.{name}", minimum=1, purpose="it is a size of the work")
        elif get_origin(kinds[name]) is Literal:
            one_of(config, f"{key}.{name}", get_args(kinds[name]))
    return work


def other_sizes(work: Work, name: str) -> list[object]:
    """Returns values of a size that differ from the work's own: the numbers beside it, or the other choices."""
    kind, own = get_type_hints(type(work))[name], getattr(work, name)
    if get_origin(kind) is Literal:
        return [choice for choice in get_args(kind) if choice != own]
    return [own + 1, *([own - 1] if own > 1 else [])]


def sizes(work: Work) -> list[str]:
    """Returns the names of a work's sizes."""
    return [item.name for item in fields(work)]  # type: ignore[arg-type]
