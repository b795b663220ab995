"""Which constraint holds for which hyperparameter, and moving hyperparameters back into their sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch

from hypertorch.constraints import Constraint
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorMapping


def match_constraints(
    names: Iterable[str], *, chosen: Mapping[str, Constraint], problem: BilevelProblem
) -> dict[str, Constraint]:
    """Returns the constraint of each hyperparameter that has one.

    A name wins over a pattern, and an earlier pattern over a later one. What is chosen wins over what the outer problem
    declares, and that over the natural constraints of the dynamics.

    Args:
        names: the hyperparameters.
        chosen: the user's constraints by name or pattern (`*`, `?`, `[...]`, as in file names).
        problem: the problem, which has its own.

    Raises:
        ValueError: if a name or pattern that is chosen, or that the outer problem declares, matches no hyperparameter.
    """
    names = list(names)
    declared = problem.outer.constraints()
    for whose, patterns in (("constraints", chosen), ("OuterProblem.constraints", declared)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                raise ValueError(
                    f"`{whose}` has the entry {pattern!r}, which matches none of the hyperparameters {names}: it would "
                    "do nothing. Use one of these names, or a pattern such as 'lr*' that matches some."
                )
    by_precedence = (chosen, declared, problem.constraints())
    found = {name: next(filter(None, (_first_match(name, own) for own in by_precedence)), None) for name in names}
    return {name: constraint for name, constraint in found.items() if constraint is not None}


def project_in_place(hparams: TensorMapping, constraints: Mapping[str, Constraint]) -> None:
    """Moves each constrained hyperparameter to the nearest point of its set."""
    # In place: the optimizer holds these tensors.
    with torch.no_grad():
        for name, constraint in constraints.items():
            hparams[name].copy_(constraint.project(hparams[name].detach()))


def _first_match(name: str, constraints: Mapping[str, Constraint]) -> Constraint | None:
    if name in constraints:
        return constraints[name]
    return next((constraint for pattern, constraint in constraints.items() if fnmatchcase(name, pattern)), None)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)
