"""Where a module keeps its parameters and buffers, to call it with other values there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Place(NamedTuple):
    """An entry of a dictionary inside a module, and what it held when it was found."""

    holder: dict[str, Any]
    key: str
    value: Any


class ParameterSlots:
    """The places of a module's parameters and buffers, found once.

    `torch.func.functional_call` looks for them at each call, which counts where an inner step is small.

    A tensor that is shared by several sub-modules has several places and one name, the first.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._slots: dict[str, list[_Place]] = {}
        self._modules: list[_Place] = []
        names: dict[int, str] = {}
        for prefix, part in module.named_modules():
            children: dict[str, Any] = part._modules
            self._modules.extend(_Place(children, key, child) for key, child in children.items())
            for holder in (part._parameters, part._buffers):
                for key, value in holder.items():
                    if value is not None:
                        name = names.setdefault(id(value), f"{prefix}.{key}" if prefix else key)
                        self._slots.setdefault(name, []).append(_Place(holder, key, value))
        self._places = [place for places in self._slots.values() for place in places]

    def is_current(self) -> bool:
        """Returns whether every place still holds what it held: no sub-module, weight or tie was exchanged since."""
        return all(holder.get(key) is value for holder, key, value in self._places) and all(
            holder.get(key) is value for holder, key, value in self._modules
        )

    def has(self, names: Mapping[str, Tensor]) -> bool:
        """Returns whether these are all names of places."""
        return names.keys() <= self._slots.keys()

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Surrounds calls of the module with other values in its places.

        Args:
            values: by the names of the places.
        """
        places = [(place, value) for name, value in values.items() for place in self._slots[name]]
        kept = [place.holder[place.key] for place, _ in places]
        try:
            for (holder, key, _), value in places:
                holder[key] = value
            yield
        finally:
            for (place, _), value in zip(places, kept, strict=True):
                place.holder[place.key] = value


def is_plain(module: nn.Module) -> bool:
    """Returns whether a module's places can be written to: not those of compiled and replicated modules."""
    return not isinstance(module, torch.jit.ScriptModule | nn.DataParallel)
