"""The natural constraints of learnt settings: the ranges in which an update rule makes sense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hypertorch.constraints import Box, Constraint, Positive
from hypertorch.dynamics.hyper import Hyper, Setting, parts

POSITIVE = Positive()
NON_NEGATIVE = Box(lower=0.0)
PROPORTION = Box(lower=0.0, upper=1.0)
DECAY = Box(lower=0.0, upper=1.0 - 1e-6)
"""Of a factor that a running mean keeps: at 1 it would never learn of a gradient."""


def natural_constraints(
    settings: Mapping[str, Setting], natural: Mapping[str, Positive | Box]
) -> dict[str, Constraint]:
    """Returns the constraints of all settings that are learnt directly, by name or pattern of the outer variable.

    A setting learnt through a `transform` is left free: the transform is what keeps it in range.

    Args:
        settings: the settings by name, groups included.
        natural: the range of each, by the same names.
    """
    return intersections(
        {part.pattern: natural[name]}
        for name, setting in settings.items()
        for part in parts(setting)
        if isinstance(part, Hyper) and part.transform is None
    )


def intersections(declared: Iterable[Mapping[str, Constraint]]) -> dict[str, Constraint]:
    """Returns one constraint for each name; an outer variable that serves several settings is kept in all ranges.

    Raises:
        ValueError: if two constraints of one name differ and are no ranges, or have no number in common.
    """
    result: dict[str, Constraint] = {}
    for constraints in declared:
        for name, constraint in constraints.items():
            known = result.get(name, constraint)
            result[name] = known if known == constraint else _intersection(name, known, constraint)
    return result


def _intersection(name: str, first: Constraint, second: Constraint) -> Constraint:
    bounds = [_bounds(constraint) for constraint in (first, second)]
    known = [pair for pair in bounds if pair is not None]
    if len(known) == 2:
        lower, upper = max(pair[0] for pair in known), min(pair[1] for pair in known)
        if lower <= upper:
            return Box(lower=lower, upper=upper)
    raise ValueError(
        f"the outer variable `{name}` has two constraints, {first} and {second}, with nothing in common that the "
        "library can find. Let two settings read two variables."
    )


def _bounds(constraint: Constraint) -> tuple[float, float] | None:
    if isinstance(constraint, Positive):
        return constraint.minimum, float("inf")
    return (constraint.lower, constraint.upper) if isinstance(constraint, Box) else None
