"""Settings by the name of an outer variable, or by a pattern of names (`*`, `?`, `[...]`, as in file names)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

Setting = TypeVar("Setting")


def first_match(name: str, settings: Mapping[str, Setting]) -> Setting | None:
    """Returns the setting of an outer variable: its name wins over a pattern, an earlier pattern over a later one."""
    if name in settings:
        return settings[name]
    return next((setting for pattern, setting in settings.items() if fnmatchcase(name, pattern)), None)


def check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raises if a name or pattern matches no outer variable.

    Args:
        argument: what has the patterns, for the message.
        patterns: names or patterns.
        names: the outer variables.

    Raises:
        ValueError: naming the pattern and the outer variables.
    """
    names = list(names)
    for pattern in patterns:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`{argument}` has the entry {pattern!r}, which matches none of the hyperparameters {names}: it would "
                "do nothing. Use one of these names, or a pattern such as 'lr*' that matches some."
            )


def check_each_wins(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raises if a name or pattern is chosen for no outer variable, as others win before it.

    Raises:
        ValueError: naming the pattern and the outer variables.
    """
    names, own = list(names), {pattern: pattern for pattern in patterns}
    chosen = {first_match(name, own) for name in names}
    for pattern in own:
        if pattern not in chosen:
            raise ValueError(
                f"`{argument}` has the entry {pattern!r}, before which others win for every hyperparameter that it "
                f"matches, of {names}: a name wins over a pattern, and an earlier pattern over a later one. Leave it "
                "out, or put it first."
            )
