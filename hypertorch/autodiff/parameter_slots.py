"""Where a module keeps its parameters and buffers, to call it with other values there."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Place(NamedTuple):
    """An entry of a dictionary inside a module, and what it holds at some time."""

    holder: dict[str, Any]
    key: str
    value: Any


class Moved(NamedTuple):
    """A buffer that a call of a module has moved.

    Attributes:
        layer: the part of the module that has it.
        value: its new value.
        is_returned: whether the new value was handed to the caller.
    """

    layer: nn.Module
    value: Tensor
    is_returned: bool


class Watch:
    """What calls of modules do, seen from inside `watching`.

    Attributes:
        calls: the places of each module that was called, with the names of those that held other values.
        moved: the buffers that a call has moved, by name.

    Args:
        shifted: a buffer that every call starts from another value of.
    """

    def __init__(self, shifted: str | None = None) -> None:
        self.calls: list[tuple[ParameterSlots, list[str]]] = []
        self.moved: dict[str, Moved] = {}
        self._shifted = shifted

    def start(self, name: str, value: Tensor) -> Tensor:
        """Returns what a call takes for the first value of a buffer."""
        return moved_away(value) if name == self._shifted else value

    def note(
        self, module: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, is_returned: bool
    ) -> None:
        """Takes down what a call has made of its buffers."""
        for name, value in after.items():
            if not torch.equal(before[name], value):
                self.moved[name] = Moved(module.get_submodule(name.rpartition(".")[0]), value, is_returned)


def moved_away(value: Tensor) -> Tensor:
    """Returns another value, far enough to show where it is read."""
    return value + 0.1 * (value.abs() + 1.0) if value.is_floating_point() or value.is_complex() else value + 1


class _Thread(threading.local):
    """What is under way in a thread.

    Attributes:
        calls: the places of the modules that are being called with other values, the outermost first.
        watch: who watches the calls.
    """

    def __init__(self) -> None:
        self.calls: list[ParameterSlots] = []
        self.watch: Watch | None = None


thread = _Thread()

one_at_a_time = threading.RLock()
"""Held while a module is called with other values: modules that share a part are one to threads."""


@contextmanager
def watching(shifted: str | None = None) -> Iterator[Watch]:
    """Surrounds calls of modules that are to be watched.

    Args:
        shifted: a buffer that every call starts from another value of, to see whether it is read.
    """
    watch, outside = Watch(shifted), thread.watch
    thread.watch = watch
    try:
        yield watch
    finally:
        thread.watch = outside


class ParameterSlots:
    """The places of a module's parameters and buffers, found once.

    `torch.func.functional_call` looks for them at each call, which counts where an inner step is small.

    A tensor that is shared by several sub-modules has several places and one name, the first.

    Args:
        module: the module.

    Attributes:
        is_tied: whether a tensor is shared by several sub-modules.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # These run copies or compiled code, which do not look into the places.
        self._is_plain = not isinstance(module, torch.jit.ScriptModule | nn.DataParallel)
        self._slots: dict[str, list[_Place]] = {}
        modules: list[_Place] = []
        self._buffers: dict[str, list[_Place]] = {}
        names: dict[int, str] = {}
        for prefix, part in module.named_modules():
            children: dict[str, Any] = part._modules
            # Children too: one that is exchanged brings other places.
            modules.extend(_Place(children, key, child) for key, child in children.items())
            for holder in (part._parameters, part._buffers):
                for key, value in holder.items():
                    # A layer without a bias has a place for it, and nothing there.
                    if value is not None:
                        # By identity: a tied weight is one tensor in several places, and has the name of the first.
                        name = names.setdefault(id(value), f"{prefix}.{key}" if prefix else key)
                        places = self._slots.setdefault(name, [])
                        places.append(_Place(holder, key, value))
                        if holder is part._buffers:
                            self._buffers[name] = places
        self.is_tied = any(len(places) > 1 for places in self._slots.values())
        self._held = [*(place for places in self._slots.values() for place in places), *modules]

    @property
    def buffer_names(self) -> Set[str]:
        """Names of the places that hold buffers."""
        return self._buffers.keys()

    def is_current(self) -> bool:
        """Returns whether every place still holds what it held: no sub-module, weight or tie was exchanged since."""
        # At every call of the module: a generator would be resumed for every place.
        for holder, key, value in self._held:  # noqa: SIM110
            if holder.get(key) is not value:
                return False
        return True

    def serves(self, names: Mapping[str, Tensor]) -> bool:
        """Returns whether the module can be called with values of these names written to their places.

        Not those of compiled and replicated modules.
        """
        return self._is_plain and names.keys() <= self._slots.keys()

    @contextmanager
    def holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Surrounds a call of the module with other values in its places.

        Args:
            values: by the names of the places. A buffer that the module replaces by a new tensor is replaced here too.
        """
        kept: list[tuple[dict[str, Any], str, Any]] = []
        calls = thread.calls
        calls.append(self)
        if thread.watch is not None:
            thread.watch.calls.append((self, list(values)))
        try:
            for name, value in values.items():
                # Past `setattr`, which refuses a plain tensor where a module has a parameter.
                for holder, key, _ in self._slots[name]:
                    kept.append((holder, key, holder[key]))
                    holder[key] = value
            yield
            for name, buffers in self._buffers.items():
                if name in values:
                    values[name] = buffers[0].holder[buffers[0].key]
        finally:
            calls.pop()
            # From the last to the first: values that two names give to one place were written over each other.
            for holder, key, value in reversed(kept):
                holder[key] = value

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Surrounds a call of the module for which somebody else writes the values to its places."""
        calls = thread.calls
        calls.append(self)
        try:
            yield
        finally:
            calls.pop()

    @contextmanager
    def holding_others(self, names: Iterable[str]) -> Iterator[None]:
        """Surrounds code that must not read what the module holds in these places outside of its calls."""
        with one_at_a_time, self.holding({name: moved_away(self._slots[name][0].value.detach()) for name in names}):
            yield

    def contents(self) -> Contents:
        """Returns what the module holds now, during a call."""
        names = self._buffers.keys()
        return Contents(
            _now([place for name, places in self._slots.items() if name not in names for place in places]),
            _now([place for places in self._buffers.values() for place in places]),
            [(part, part.training) for part in self.module.modules()],
        )


class Contents:
    """What a module held at some time during a call, to be held again when a part of the call is run again.

    Args:
        parameters: their places, with what they held.
        buffers: the same of the buffers.
        modes: the parts of the module, with whether they were in training mode.
    """

    def __init__(self, parameters: list[_Place], buffers: list[_Place], modes: list[tuple[nn.Module, bool]]) -> None:
        self._parameters = parameters
        # The call goes on to change buffers in place, and so does every part that is run again.
        self._buffers = _copied(buffers)
        self._modes = modes

    @contextmanager
    def held(self) -> Iterator[None]:
        """Surrounds a part of the call that is run again."""
        places = [*self._parameters, *_copied(self._buffers)]
        before = _now(places)
        modes = [(part, part.training) for part, _ in self._modes]
        try:
            _write(places, self._modes)
            yield
        finally:
            _write(before, modes)


def _now(places: list[_Place]) -> list[_Place]:
    """Returns the places with what they hold now."""
    return [_Place(holder, key, holder.get(key)) for holder, key, _ in places]


def _copied(places: list[_Place]) -> list[_Place]:
    """Returns the places with copies of their values, without a graph."""
    return [place if place.value is None else place._replace(value=place.value.detach().clone()) for place in places]


def _write(places: list[_Place], modes: list[tuple[nn.Module, bool]]) -> None:
    for holder, key, value in places:
        holder[key] = value
    for part, mode in modes:
        part.training = mode
