"""From a block of the configuration to the object that it describes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.common.commands.config_errors import one_line
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.reads import check_arguments


def make(config: DictConfig, key: str) -> partial[Any]:
    """Returns the class or function that a block of the configuration names, with the block's arguments bound.

    Only bound, not called: what the program itself passes (a network, a data set) must not pass through OmegaConf,
    which would take a dataclass apart.

    Args:
        config: the configuration.
        key: dotted name of the block.

    Raises:
        ExpectedFailure: if the block names nothing, or it or a block in it has an argument that its target does not
            take.
    """
    block = OmegaConf.select(config, key)
    if not isinstance(block, DictConfig) or "_target_" not in block:
        raise ExpectedFailure(
            f"`{key}` is {block!r}, which names nothing to build: a block with `_target_` is needed. Choose one of the "
            f"files in configs/ ({key}=name), or leave the setting out."
        )
    check_arguments(block, key)
    for name, only in (("_partial_", True), ("_convert_", "all")):
        if block.get(name, only) != only:
            raise ExpectedFailure(
                f"`{key}.{name}` is {block[name]!r}, but the command itself says how this block is built: it would "
                "have no effect. Leave it out."
            )
    try:
        return instantiate(block, _partial_=True, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (TypeError, ValueError)) and "`" in str(cause):
            raise ExpectedFailure(str(cause)) from error
        raise ExpectedFailure(
            f"`{key}` names {block._target_!r}, which cannot be built as it is set ({one_line(cause or error)}). "
            f"Correct `{key}._target_`, or the setting that is of the wrong kind."
        ) from error


def build(
    config: DictConfig, key: str, *arguments: Any, instead: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Returns the object that a block of the configuration describes.

    Args:
        config: the configuration.
        key: dotted name of the block.
        arguments: what the program itself passes.
        instead: values of other settings, which win over those of the block here.
        options: what the program itself passes, by name.

    Raises:
        ExpectedFailure: if a setting has a value that its class cannot work with, or the block has an argument that
            the program passes.
    """
    bound = make(config, key)
    passed = [*list(inspect.signature(bound.func).parameters)[: len(arguments)], *options]
    for name in passed:
        if name in bound.keywords:
            raise ExpectedFailure(
                f"`{key}.{name}` is {bound.keywords[name]!r}, but the command passes `{name}` to "
                f"{bound.func.__name__} itself, made from other settings: this one would have no effect. Leave it out."
            )
    try:
        return bound(*arguments, **{**(instead or {}), **options})
    except (TypeError, ValueError) as error:
        if "`" in str(error):
            raise
        # The class met a value that it was not written for, such as a word in place of a number.
        raise ExpectedFailure(
            f"`{key}` is {bound.func.__name__}({spelt_arguments(bound)}), which cannot be built: {one_line(error)}. "
            "Correct the setting that has the wrong kind of value."
        ) from error


def spelt_arguments(bound: partial[Any]) -> str:
    """Returns the arguments that are bound, as in a call, for a message."""
    return ", ".join(f"{name}={value!r}" for name, value in bound.keywords.items())
