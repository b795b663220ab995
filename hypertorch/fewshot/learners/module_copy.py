"""Copies of a user's module, whatever it holds beside its weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)
# What `deepcopy` raises of locks and open files, of stored tensors with a graph, and of objects that forbid it.
_ERRORS = (TypeError, RuntimeError, pickle.PicklingError)


def copy_module(module: _Module) -> _Module:
    """Returns a copy of a module with parameters, buffers and submodules of its own.

    What cannot be copied (a lock, an open file, an output kept with its graph) is shared with the original.

    Args:
        module: the module.
    """
    try:
        return copy.deepcopy(module)
    except _ERRORS:
        # `deepcopy` treats everything in its memo as copied already, and shares it.
        return copy.deepcopy(module, {id(value): value for value in _uncopyable(module, set())})


def _uncopyable(value: object, seen: set[int]) -> Iterator[object]:
    """Yields the innermost objects that cannot be copied."""
    # Modules may refer to each other in a circle.
    if id(value) in seen or _is_copyable(value):
        return
    seen.add(id(value))
    parts: Iterable[object]
    if isinstance(value, nn.Module):
        parts = vars(value).values()
    elif isinstance(value, dict):
        parts = (*value.keys(), *value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = value
    else:
        # Innermost, so that as little as possible is shared: a shared weight would change when its owner trains it.
        yield value
        return
    for part in parts:
        yield from _uncopyable(part, seen)


def _is_copyable(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except _ERRORS:
        return False
    return True
