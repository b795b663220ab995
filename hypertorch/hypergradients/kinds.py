"""What problems have in common that run the same code, whatever their tensors hold."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from functools import partial
from types import CellType, FunctionType

import torch
from torch import nn

from hypertorch.problem import BilevelProblem


def kind_of(problem: BilevelProblem) -> Hashable:
    """Returns what is the same for problems that run the same operations, as far as their attributes tell.

    Namely words, switches, functions with what they are closed over, and the classes of everything else; of the inner
    optimiser numbers, too.

    Cost: some microseconds.
    """
    numbers = tuple((name, value) for name, value in _attributes(problem.dynamics) if type(value) in (int, float))
    return _kind(problem.inner), _kind(problem.outer), _kind(problem.dynamics), numbers


def _kind(thing: object) -> Hashable:
    return type(thing), tuple((name, _mark(value)) for name, value in _attributes(thing))


def _attributes(thing: object) -> list[tuple[str, object]]:
    if is_dataclass(thing):
        return [(entry.name, getattr(thing, entry.name)) for entry in fields(thing)]
    return list(getattr(thing, "__dict__", {}).items())


def _mark(value: object, depth: int = 4) -> Hashable:
    if value is None or isinstance(value, (str, bool, torch.dtype)):
        return value
    if isinstance(value, partial):
        return "partial", _mark(value.func, depth)
    if isinstance(value, FunctionType):
        # A factory of losses gives them the same code.
        return value.__code__, tuple(_mark(inside, depth - 1) for inside in _closed_over(value)) if depth else ()
    if isinstance(value, nn.Module):
        return tuple(type(module) for module in value.modules())
    return type(value)


def _closed_over(function: FunctionType) -> list[object]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
