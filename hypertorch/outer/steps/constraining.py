"""Which constraint holds for which hyperparameter, and moving hyperparameters back into their sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from hypertorch.constraints import Constraint
from hypertorch.outer.steps.patterns import check_patterns, first_match
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorMapping


def match_constraints(
    names: Iterable[str], *, chosen: Mapping[str, Constraint], problem: BilevelProblem
) -> dict[str, Constraint]:
    """Returns the constraint of each hyperparameter that has one.

    What is chosen wins over what the outer problem declares, and that over the natural constraints of the dynamics.

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
        check_patterns(whose, patterns, names)
    by_precedence = (chosen, declared, problem.constraints())
    found = {name: next(filter(None, (first_match(name, own) for own in by_precedence)), None) for name in names}
    return {name: constraint for name, constraint in found.items() if constraint is not None}


def project_in_place(hparams: TensorMapping, constraints: Mapping[str, Constraint]) -> None:
    """Moves each constrained hyperparameter to the nearest point of its set."""
    # In place: the optimizer holds these tensors.
    with torch.no_grad():
        for name, constraint in constraints.items():
            hparams[name].copy_(constraint.project(hparams[name].detach()))
