"""The kind of a problem: equal for problems that run the same operations, whatever their tensors hold."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodDescriptorType, MethodType, ModuleType

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from hypertorch.dynamics import Dynamics
from hypertorch.nn.functional_module import FunctionalModule
from hypertorch.problem import BilevelProblem

_FEW = 32  # entries of a container that is looked into; a longer one holds data


def kind_of(problem: BilevelProblem) -> Hashable:
    """Returns what is the same for problems that run the same operations, as far as their attributes tell.

    Namely words, numbers and switches, functions with what they are closed over, parts of modules with their modes and
    switches, short containers and objects with what they hold, and the classes of everything else. A number can
    choose operations as a word does (`if self.variant == 2`). An attribute that counts the calls therefore makes every
    call a new kind, which is slow but not wrong. Numbers in a list are left out, because problems append figures to
    lists. No tensor is held.

    Cost: some microseconds for each attribute, and about three for every part of a module.
    """
    return _kind(problem.inner), _kind(problem.outer), _mark(problem.context), _mark(problem.dynamics)


# Loops here and not comprehensions: a net has hundreds of marks, and they are made at every hypergradient.
def _kind(thing: object, depth: int = 4) -> Hashable:
    """Returns the class of an object, and the marks of its attributes by name."""
    marks: list[Hashable] = [type(thing)]
    if is_dataclass(thing):
        for entry in fields(thing):
            marks += entry.name, _mark(getattr(thing, entry.name), depth)
    else:
        for name, value in getattr(thing, "__dict__", {}).items():
            marks += name, _mark(value, depth)
    return tuple(marks)


def _module_kind(module: nn.Module, depth: int) -> Hashable:
    """Returns the classes of a module's parts, and the marks of what is neither parameter, buffer nor submodule.

    Hooks that change gradients are among them, where there are some.
    """
    marks: list[Hashable] = []
    parts, known = [module], {module}
    # Children are added on the way. `Module.modules` and `Module.children` make their names too, which takes longer.
    for part in parts:
        # All modules of `torch.jit` have one class.
        marks.append(part.code if isinstance(part, ScriptModule) and hasattr(part, "forward") else type(part))
        for name, value in vars(part).items():
            if name not in _PLUMBING and not name.startswith("_"):
                kind = type(value)
                # Nearly all are: a call for each would take longer than all else here.
                marks += name, (kind, value) if kind in _NUMBERS else _mark(value, depth)
        for name in _BACKWARD_HOOKS:
            hooks = getattr(part, name)
            if hooks:
                marks += name, _mark(hooks, depth)
        for child in part._modules.values():
            if child is not None and child not in known:
                known.add(child)
                parts.append(child)
    return tuple(marks)


_NUMBERS = frozenset({bool, int, float})
_TENSOR = (Tensor,)
_PLUMBING = frozenset(name for name in vars(nn.Module()) if name.startswith("_"))
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


# The depth bounds the walk: objects may refer to each other in a circle.
def _mark(value: object, depth: int = 4) -> Hashable:
    kind = type(value)
    # The most frequent cases first.
    if kind is Tensor and not value.__dict__:
        return _TENSOR
    if isinstance(value, (bool, int, float)) and not isinstance(value, Enum):
        return kind, value  # 1, 1.0 and True are equal, and choose other branches
    if value is None or isinstance(value, (str, Enum, torch.dtype, type, MethodDescriptorType)):
        return value
    if isinstance(value, BuiltinFunctionType):  # of a method of an object, not the object
        return value.__module__, value.__qualname__
    if isinstance(value, ModuleType):
        return value.__name__
    if not depth:
        return type(value)
    if isinstance(value, Dynamics):  # one that wraps others holds them as attributes
        return _kind(value, depth - 1)
    if isinstance(value, FunctionalModule):
        return FunctionalModule, _mark(value.module, depth)
    if isinstance(value, nn.Module):
        return _module_kind(value, depth - 1)
    if isinstance(value, partial):
        bound = (*value.args, *value.keywords.values())
        return "partial", _mark(value.func, depth), tuple(_mark(inside, depth - 1) for inside in bound)
    if isinstance(value, MethodType):
        return _mark(value.__func__, depth - 1), _kind(value.__self__, depth - 1)
    if isinstance(value, FunctionType):
        # A factory of losses gives them the same code.
        return value.__code__, tuple(_mark(inside, depth - 1) for inside in _closed_over(value))
    if isinstance(value, (tuple, list, dict)) and len(value) > _FEW:
        return type(value)
    if isinstance(value, dict):
        return dict, tuple([(name, _mark(inside, depth - 1)) for name, inside in value.items()])
    if isinstance(value, tuple):
        return type(value), tuple([_mark(inside, depth - 1) for inside in value])
    if isinstance(value, list):
        # The set of entries, without their count and without numbers: a list that grows makes no new kind.
        telling = (inside for inside in value if not isinstance(inside, (int, float, torch.Tensor)))
        return list, frozenset(_mark(inside, depth - 1) for inside in telling)
    return _kind(value, min(depth - 1, 1))


def _closed_over(function: FunctionType) -> list[object]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _is_filled(cell: CellType) -> bool:
    # The cell of a name that is not bound yet is empty, as in a function that calls itself while it is being made.
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
