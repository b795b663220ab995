"""Which constraint holds for which hyperparameter, and moving hyperparameters back into their sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch

from hypertorch.constraints import Constraint
from hypertorch.types import TensorMapping


def match_constraints(
    names: Iterable[str], *, chosen: Mapping[str, Constraint], natural: Mapping[str, Constraint]
) -> dict[str, Constraint]:
    """Returns the constraint of each hyperparameter that has one.

    A name wins over a pattern, an earlier pattern over a later one, and what the user chose over what is natural.

    Args:
        names: the hyperparameters.
        chosen: the user's constraints by name or pattern (`*`, `?`, `[...]`, as in file names).
        natural: the problem's own, likewise.

    Raises:
        ValueError: if one of the chosen names or patterns matches no hyperparameter.
    """
    names = list(names)
    for pattern in chosen:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(
                f"`constraints` has the entry {pattern!r}, which matches none of the hyperparameters {names}: it would "
                "do nothing. Use one of these names, or a pattern such as 'lr*' that matches some."
            )
    found = {name: _first_match(name, chosen) or _first_match(name, natural) for name in names}
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
