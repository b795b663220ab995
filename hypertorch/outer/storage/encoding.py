"""State dictionaries of optimisers and schedulers as JSON values and a flat dictionary of tensors."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from typing import Any

from torch import Tensor

from hypertorch.errors import CheckpointError
from hypertorch.types import TensorDict

_TENSOR, _FLOAT, _TUPLE = "$tensor", "$float", "$tuple"
# `MultiStepLR`, for one, holds a `Counter` and calls methods that a plain dict lacks.
_MAPPINGS: dict[str, type[dict[Any, Any]]] = {"$dict": dict, "$ordered": OrderedDict, "$counter": Counter}


def encode(value: Any, path: str, tensors: TensorDict) -> Any:
    """Returns `value` in a form that JSON can hold; `decode` returns an equal value of the same types.

    It takes None, booleans, integers, floats (infinite ones too), strings, lists, tuples, dictionaries with any of
    these as keys, and tensors, which go into a dictionary of their own.

    Args:
        value: a state dictionary, or a part of one.
        path: where it comes from, such as `optimizer/state/0`; names the tensors and the offender in a message.
        tensors: receives the tensors found.

    Raises:
        CheckpointError: if a part can be kept neither as JSON nor as a tensor.
    """
    if isinstance(value, Tensor):
        return {_TENSOR: _put_aside(value, path, tensors)}
    if isinstance(value, float):  # subclasses too, such as numpy's float64
        return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
    # By type, not `isinstance`: a subclass (an enum) would come back as its base.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is list:
        return [encode(item, f"{path}/{position}", tensors) for position, item in enumerate(value)]
    if type(value) is tuple:
        return {_TUPLE: [encode(item, f"{path}/{position}", tensors) for position, item in enumerate(value)]}
    for tag, kind in _MAPPINGS.items():
        if type(value) is kind:
            return {
                tag: [
                    [encode(key, path, tensors), encode(item, f"{path}/{key}", tensors)] for key, item in value.items()
                ]
            }
    raise CheckpointError(
        f"`{path}` is a {type(value).__name__}, which a checkpoint cannot hold: checkpoints are tensors and JSON, so "
        "that loading one never runs code. Use an optimizer and a scheduler whose state is made of tensors, numbers, "
        "strings, lists, tuples and dicts, or run without `checkpoints`."
    )


def decode(value: Any, tensors: TensorDict) -> Any:
    """Returns what `encode` was given.

    Args:
        value: what `encode` returned.
        tensors: the tensors that `encode` put aside.

    Raises:
        KeyError: if a tensor is missing.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    # Every mapping is written under one tag. An object of more entries was altered, and the unpacking raises.
    ((tag, content),) = value.items()
    if tag == _TENSOR:
        return tensors[content]
    if tag == _FLOAT:
        return float(content)
    if tag == _TUPLE:
        return tuple(decode(item, tensors) for item in content)
    # Pairs, because JSON has no keys but strings, and optimizers number their params by integers.
    pairs = {decode(key, tensors): decode(item, tensors) for key, item in content}
    return _MAPPINGS[tag](pairs)


def _put_aside(value: Tensor, path: str, tensors: TensorDict) -> str:
    # Keys 0 and "0" of one dict, or a key with a slash, would give two tensors the same path.
    while path in tensors:
        path += "'"
    tensors[path] = value
    return path
