"""Buffers that a dynamics keeps for every parameter, in the flat dictionary that is carried from step to step."""

from __future__ import annotations

from collections.abc import Mapping

from hypertorch.types import TensorDict, TensorMapping


def flattened(buffers: Mapping[str, TensorMapping]) -> TensorDict:
    """Returns `{buffer}.{parameter}` from the buffers of every parameter; a buffer's own name has no dot."""
    return {f"{name}.{parameter}": value for parameter, own in buffers.items() for name, value in own.items()}


def by_parameter(state: TensorMapping) -> dict[str, TensorDict]:
    """Returns the buffers of every parameter that has any, from `{buffer}.{parameter}`."""
    buffers: dict[str, TensorDict] = {}
    for key, value in state.items():
        name, _, parameter = key.partition(".")
        buffers.setdefault(parameter, {})[name] = value
    return buffers
