"""What problems have in common that run the same code, whatever their tensors hold."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType

import torch
from torch import nn

from hypertorch.problem import BilevelProblem


def kind_of(problem: BilevelProblem) -> Hashable:
    """Returns what is the same for problems that run the same operations, as far as their attributes tell.

    Namely words, switches, functions and the classes of everything else; of the inner optimiser numbers, too.

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


def _mark(value: object) -> Hashable:
    if value is None or isinstance(value, (str, bool, torch.dtype)):
        return value
    if isinstance(value, partial):
        return "partial", _mark(value.func)
    if isinstance(value, FunctionType):
        return value.__code__
    if isinstance(value, nn.Module):
        return tuple(type(module) for module in value.modules())
    return type(value)
