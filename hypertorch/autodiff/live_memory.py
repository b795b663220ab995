"""Live tensor bytes, counted: what a piece of code holds at once, on all devices together."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypertorch.checks.argument_types import typed


class PeakMemory(TorchDispatchMode):
    """A context in which every new tensor is counted for as long as it lives.

    Every operation's outputs are counted when they appear, each storage once, and taken off when their storage dies:
    values, activations that a graph saves, gradients on their way back, buffers of an update. Bytes are those of the
    storages, as they were asked for: an allocator's rounding and its cache are not in it, so the same code gives the
    same numbers on a CPU and on a GPU. What lived before the context is not counted, nor are views of it.

        with ht.live_memory.PeakMemory() as memory:
            result = ht.hypergradient(problem, hparams, backend=backend)
        memory.peak, memory.current  # the most that lived at once; what lives now, the result

    Tensors are followed after the context too: `current` falls when they die, but new ones are not seen.

    Not seen: workspace inside a single kernel, and tensors of other layouts than strided. A compiled function runs
    eagerly in the context, and is counted as the code it was compiled from; a backend with `compile=True` warns of it.
    The memory of an array of numpy counts where PyTorch makes a tensor of it.

    Cost: Python code for every operation, many times that of a small one. Do not time anything inside.

    Attributes:
        current: bytes alive now of what appeared in the context.
        peak: the most that `current` has been, since the start or the last `reset_peak`.
    """

    supports_higher_order_operators = True  # `torch.cond` and its like: their outputs are counted

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._living: dict[int, _Storage] = {}

    def reset_peak(self) -> None:
        """Starts a new search for the peak, from what lives now."""
        self.peak = self.current

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        # Only what is counted must be followed further; when the last of it dies, nothing refers to this object.
        self._living = {key: storage for key, storage in self._living.items() if storage.counts}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs one operation and counts what it made."""
        # `torch.tensor` and its like pass the finished tensor through this operation, and show it nowhere else.
        if func is not torch.ops.aten.lift_fresh.default:
            for storage in _storages((args, kwargs)):
                self._follow(storage, lived_before=True)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._follow(storage, lived_before=False)
        return result

    def _follow(self, storage: torch.UntypedStorage, *, lived_before: bool) -> None:
        """Counts a storage met for the first time, or one that was resized."""
        # The address of the memory: all views of it share one. Nothing is
        # kept alive by being followed, hence the weak reference.
        key = storage._cdata
        known = self._living.get(key)
        if known is None:
            known = _Storage(counts=not lived_before, reference=weakref.ref(storage, lambda _: self._forget(key)))
            self._living[key] = known
        if known.counts:
            self._add(storage.nbytes() - known.size)
            known.size = storage.nbytes()

    def _forget(self, key: int) -> None:
        storage = self._living.pop(key, None)
        if storage is not None:
            self._add(-storage.size)

    def _add(self, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)


class _Storage:
    """A storage that lives: its bytes as counted (none if it lived before), and what tells of its death."""

    def __init__(self, *, counts: bool, reference: weakref.ref[torch.UntypedStorage]) -> None:
        self.counts = counts
        self.reference = reference
        self.size = 0


def storage_bytes(tensors: Iterable[Tensor], *, besides: Iterable[Tensor] = ()) -> int:
    """Returns the bytes that tensors keep alive, each storage once and whole, even if a tensor views a part of it.

    Args:
        tensors: the tensors.
        besides: tensors that live anyway, whose storages are not counted.
    """
    # A view keeps the whole storage alive, so storages are counted and not tensors.
    known = {storage._cdata for storage in _storages(list(besides))}
    sizes = {storage._cdata: storage.nbytes() for storage in _storages(list(tensors))}
    return sum(size for key, size in sizes.items() if key not in known)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Yields the storages of the tensors in nested lists, tuples and dicts, the only ones that operations take."""
    if isinstance(values, Tensor):
        if values.layout is torch.strided:
            yield values.untyped_storage()
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _storages(value)
    elif isinstance(values, dict):
        yield from _storages(tuple(values.values()))


_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


def parse_bytes(size: int | str, name: str = "size") -> int:
    """Returns a number of bytes written as "512MiB", "1.5 GB" or a plain number; "KB" is 1000 bytes, "KiB" 1024.

    Args:
        size: the number.
        name: of the argument, for the message.

    Raises:
        ValueError: if it is not such a number, not positive, or a part of a byte.
    """
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-z]*)\s*", str(size).lower())
    factor = units.get((found.group(2) or "b") if found else "")
    is_part = isinstance(size, float) and not size.is_integer()
    if is_part or isinstance(size, bool) or found is None or factor is None or float(found.group(1)) * factor < 1:
        raise ValueError(
            f"`{name}` is {size!r}, which is no number of bytes: it must be positive, and have one of the units "
            f"{', '.join(_UNITS)} or none. Write for example '512MiB', '1.5 GB' or 2_000_000."
        )
    return int(float(found.group(1)) * factor)


@typed("size")
def format_bytes(size: int) -> str:
    """Returns a number of bytes as a person reads it, in binary units: "512.0 MiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f} {unit}"
    return f"{size} B"
