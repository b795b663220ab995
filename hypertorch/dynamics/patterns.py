"""Patterns over the names of inner parameters, such as "head.*": which parameter belongs to which."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache


@lru_cache(maxsize=4096)
def first_match(patterns: tuple[str, ...], parameter: str) -> str | None:
    """Returns the pattern that a parameter belongs to: its own name, else the first that matches; None if none does.

    Args:
        patterns: names or patterns (`*`, `?`, `[...]`, as in file names).
        parameter: the name of an inner parameter.
    """
    if parameter in patterns:
        return parameter
    return next((pattern for pattern in patterns if fnmatchcase(parameter, pattern)), None)


def belonging(patterns: Iterable[str], pattern: str, parameters: Iterable[str]) -> list[str]:
    """Returns the parameters, in their order, that belong to one of the patterns."""
    patterns = tuple(patterns)
    return [parameter for parameter in parameters if first_match(patterns, parameter) == pattern]


def check_patterns(argument: str, patterns: Collection[str], parameters: Collection[str]) -> None:
    """Raises unless every parameter belongs to a pattern, and every pattern has a parameter.

    A "*" that earlier patterns leave nothing to is no mistake: it says what holds for all others.

    Args:
        argument: how the message calls the mapping, backticks included.
        patterns: its keys, in order.
        parameters: names of the inner parameters.

    Raises:
        ValueError: naming the parameter or the pattern.
    """
    known = sorted(parameters)
    for parameter in parameters:
        if first_match(tuple(patterns), parameter) is None:
            raise ValueError(
                f"{argument} has the entries {list(patterns)}, none of which matches the inner parameter "
                f"`{parameter}`: it would have no value. Add an entry for it, or a last one '*' for all others."
            )
    for pattern in patterns:
        if not any(pattern == parameter or fnmatchcase(parameter, pattern) for parameter in parameters):
            raise ValueError(
                f"{argument} has the entry {pattern!r}, which matches none of the inner parameters {known}: it would "
                "do nothing. Use one of these names, or a pattern that matches some."
            )
        if pattern != "*" and not belonging(patterns, pattern, parameters):
            raise ValueError(
                f"{argument} has the entry {pattern!r}, but every inner parameter it matches belongs to another entry "
                f"of {list(patterns)}: it would do nothing. A name wins over a pattern, and an earlier pattern over a "
                "later one: put it first, or drop it."
            )
