"""Checks of the integers that describe an episode or a data set."""

from __future__ import annotations

from hypertorch.checks.values import is_count

MOST = 2**31 - 1
"""The largest count of tasks, examples, classes or steps."""


def check_integer(name: str, value: int, *, minimum: int, why: str, advice: str, nature: str | None = None) -> None:
    """Raises unless `value` is an integer of at least `minimum`.

    Args:
        name: the argument, for the message.
        value: what was passed for it.
        minimum: the smallest value allowed.
        why: what is wrong with a smaller one.
        advice: what to pass instead.
        nature: why it has to be an integer; by default `why` says that too.

    Raises:
        TypeError: if it is no integer (a bool is none).
        ValueError: if it is too small.
    """
    # A bool is an int in Python: `shot=True` would silently mean 1.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` is {value!r}, a {type(value).__name__}: {nature or why}. Pass an integer; {advice}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}: {why}. {advice[0].upper()}{advice[1:]}.")


def check_count(name: str, value: int, *, minimum: int, why: str, advice: str) -> None:
    """Raises unless `value` is a whole number of things, of at least `minimum`; arguments as in `check_integer`.

    Raises:
        TypeError: if it is no integer (a bool is none).
        ValueError: if it is too small, or above `MOST`.
    """
    nature = "it is a count, so a whole number"
    check_integer(name, value, minimum=minimum, why=why, advice=advice, nature=nature)
    _check_most(name, value)


def _check_most(name: str, value: int) -> None:
    if value > MOST:
        raise ValueError(f"`{name}` must be at most {MOST}, got {value}: no memory holds so many. Use fewer.")


def check_step(step: int) -> None:
    """Raises unless `step` is an integer from 0 on."""
    check_integer("step", step, minimum=0, why="batches are numbered from 0", advice="ask for batch 0 or later")


def check_num_tasks(num_tasks: int) -> None:
    """Raises unless `num_tasks` is an integer from 1 on."""
    check_count(
        "num_tasks", num_tasks, minimum=1, why="a batch without an episode has no outer loss", advice="use 1 or more"
    )


def check_num_queries(num_queries: int) -> None:
    """Raises unless `num_queries` is an integer from 1 on."""
    check_count(
        "num_queries",
        num_queries,
        minimum=1,
        why="without query examples an episode cannot be judged",
        advice="use 1 or more (15 is usual)",
    )


def check_shot(shot: int) -> None:
    """Raises unless `shot` is an integer from 1 on."""
    check_count(
        "shot", shot, minimum=1, why="without support examples there is nothing to learn from", advice="use 1 or more"
    )


def check_way(way: object) -> None:
    """Raises unless `way` is an integer from 1 on."""
    if not isinstance(way, int) or not is_count(way):  # the first is for the type checker: a count is an int
        raise ValueError(f"`way` is {way!r}: the head needs at least one output. Pass the number of classes.")
    _check_most("way", way)


def check_num_steps(num_steps: int) -> None:
    """Raises unless `num_steps` is an integer from 0 on."""
    check_count(
        "num_steps", num_steps, minimum=0, why="an inner loop takes no fewer steps than none", advice="use 1 or more"
    )
