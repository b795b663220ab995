"""A stand-in for an accelerator: tensors that say they lie on another device, and are computed on the host.

What fails on a GPU at the first run, and on no CPU, fails on it: tensors of two devices that meet, a generator of the
host for numbers of the device, noise that is not drawn again because only the host's generator was seeded. What makes
a GPU wait is counted, by the operation and the line that asked for it: a value that is read on the host, and a copy
from memory of the host that is not pinned. The numbers are those of the CPU's kernels.

"lazy" is a device that PyTorch knows and no build serves. It takes no registration, which would hold for the rest of
the process. The backward pass runs in the thread that asks for it; on a GPU it runs in one of the engine's own, and
so it does with a registered device (`tests/devices/test_registered_device.py`).
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import hypertorch

aten = torch.ops.aten
HOST = torch.device("cpu")
T = TypeVar("T")

NAME = "lazy:0"  # of the device
_LIBRARY, _TESTS = Path(hypertorch.__file__).parent, Path(__file__).parent.parent

# They read a value, or the shape of their result depends on one: either way the host waits.
_READING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# They look whether a matrix could be factorised.
_CHECKING = (
    aten._linalg_check_errors.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
    aten.linalg_eig.default,
)
# They take a position from the host, and copy it.
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)
# A number of the host, a tensor without axes, is no operand of theirs as it is of sums and products.
_JOINING = (aten.cat.default, aten.stack.default)

_OwnGenerator = torch.Generator


class DeviceTensor(Tensor):
    """A tensor of the stand-in, with its values in `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> DeviceTensor:
        if host._is_zerotensor():
            host = torch.zeros_like(host)
        made: Any = Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device=device,
        )  # fmt: skip
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The engine's threads have no mode of their own.
        return StandIn.active().run(func, args, kwargs or {})

    def tolist(self) -> Any:
        # PyTorch refuses it for subclasses; of a GPU's tensor it copies to the host.
        return self.detach().cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        # Whose address tells tensors apart that share memory.
        return self.host.untyped_storage()

    def __repr__(self) -> str:
        return f"{self.host!r} on {self.device}"


class StandIn(TorchDispatchMode):
    """A context in which the stand-in exists.

        with StandIn() as device:
            weight = torch.zeros(3, device=device.device)
            float(weight.sum())
        assert device.reads.total() == 1

    Attributes:
        device: the stand-in's, for tensors.
        reads: how often a value was read on the host, by the operation and the line of the library.
        uploads: how often a copy from the host was waited for, by the same.
    """

    _active: list[StandIn] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device(NAME)
        self._generators: list[torch.Generator] = []
        self.generator = self.make_generator()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self._pinned: set[int] = set()

    @classmethod
    def active(cls) -> StandIn:
        assert cls._active, "a tensor of the stand-in is computed with outside of its context"
        return cls._active[-1]

    def __enter__(self) -> StandIn:
        self._active.append(self)
        torch.Generator = _Generator  # type: ignore[misc, assignment]
        self._registered = hasattr(torch, self.device.type)
        if not self._registered:
            setattr(torch, self.device.type, MODULE)
        self._accelerator = torch.accelerator.current_accelerator, torch.accelerator.synchronize
        torch.accelerator.current_accelerator = lambda *_, **__: torch.device(self.device.type)  # type: ignore[assignment]
        torch.accelerator.synchronize = lambda *_, **__: None  # type: ignore[assignment]
        # `torch.tensor(3.0, device=...)` makes a tensor of the host, and shows how it is copied.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(False)
        torch.accelerator.current_accelerator, torch.accelerator.synchronize = self._accelerator
        if not self._registered:
            delattr(torch, self.device.type)
        torch.Generator = _OwnGenerator  # type: ignore[misc]
        self._active.pop()

    def reset(self) -> None:
        """Counts from zero."""
        self.reads.clear()
        self.uploads.clear()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            return self._pin(args[0])
        if func is aten.is_pinned.default:
            return id(args[0]) in self._pinned
        if kwargs.get("pin_memory"):
            made = self.__torch_dispatch__(func, types, args, {**kwargs, "pin_memory": False})
            self._pinned.add(id(made))
            return made
        here = self.is_mine(kwargs.get("device"))
        if here or any(isinstance(value, DeviceTensor) for value in pytree.tree_leaves((args, kwargs))):
            return self.run(func, args, kwargs)
        return func(*args, **kwargs)

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operation that takes or makes tensors of the stand-in."""
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        mine = [value for value in tensors if isinstance(value, DeviceTensor)]
        others = [value for value in tensors if not isinstance(value, DeviceTensor)]
        target = kwargs.get("device")
        leaves = target is not None and not self.is_mine(target)
        to_host = (leaves and bool(mine)) or (func is aten.copy_.default and not isinstance(args[0], DeviceTensor))
        waits = not (kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,)))
        # Room on the host in the shape of a tensor of the device, and a tensor without values: nothing is copied.
        copies = func in (aten._to_copy.default, aten.copy_.default) and (target is None or target.type != "meta")
        if (to_host and copies and (waits or id(args[0]) not in self._pinned)) or self._reads(func, args, kwargs):
            self.reads[_place(func)] += 1
        elif copies and not to_host:
            if others and (waits or not all(id(value) in self._pinned for value in others)):
                self.uploads[_place(func)] += 1
        elif others and mine and not to_host:
            self._check_devices(func, args, others)
        own = dict(kwargs) if target is None or leaves else {**kwargs, "device": HOST}
        result = self._compute(func, *pytree.tree_map_only(DeviceTensor, lambda value: value.host, (args, own)))
        if to_host:
            return args[0] if func is aten.copy_.default else result
        result = pytree.tree_map_only(Tensor, lambda value: DeviceTensor(value, self.device), result)
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _compute(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("generator")
        # An operation is handed an object of its own, of the same state.
        if given is not None and not any(_same(given, own) for own in self._generators):
            raise RuntimeError(f"{func} on {self.device}: expected a generator of it, found one of {given.device}")
        if given is not None or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        # The device has a generator of its own: not all operations take one as an argument.
        host = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generator.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            self.generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(host)

    def _reads(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        if func in _INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            # One value for every chosen entry is filled in without knowing how many there are.
            fills = func is not aten.index.Tensor and args[2].numel() == 1 and len(masks) == len(args[1]) == 1
            return bool(masks) and not fills
        if func is aten.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        return func in _CHECKING or any(tag in func.tags for tag in _READING)

    def _check_devices(self, func: Any, args: tuple, others: list[Tensor]) -> None:
        if func in _INDEXING and all(isinstance(value, DeviceTensor) for value in (args[0], *args[2:3])):
            self.uploads[_place(func)] += 1
            return
        written = func._schema.is_mutable and not isinstance(args[0], DeviceTensor)
        if written or func in _JOINING or any(value.dim() for value in others):
            shapes = [tuple(value.shape) for value in others]
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found {self.device} and {HOST} (of shape "
                f"{shapes}) at {_place(func)}"
            )

    def is_mine(self, device: Any) -> bool:
        """Returns whether a device is the stand-in."""
        return device is not None and torch.device(device).type == self.device.type

    def make_generator(self) -> torch.Generator:
        """Returns a generator of the stand-in."""
        self._generators.append(_OwnGenerator())
        return self._generators[-1]

    def _pin(self, value: Tensor) -> Tensor:
        copied = value.clone()
        self._pinned.add(id(copied))
        return copied

    def put(self, value: T) -> T:
        """Returns a copy of an object with all its tensors on the stand-in: those that it holds however deep."""
        return moved(value, self.device)


# PyTorch remembers the module of a device: it is one object, and serves whichever stand-in is active.
MODULE = SimpleNamespace(
    get_rng_state=lambda device=None: StandIn.active().generator.get_state(),
    set_rng_state=lambda state, device=None: StandIn.active().generator.set_state(state),
)


class _Generator(_OwnGenerator):
    """`torch.Generator`, which knows the stand-in."""

    def __new__(cls, device: Any = "cpu") -> Any:
        active = StandIn.active()
        return active.make_generator() if active.is_mine(device) else _OwnGenerator(device)


def _same(one: torch.Generator, other: torch.Generator) -> bool:
    return torch.equal(one.get_state(), other.get_state())


def _place(func: Any) -> str:
    """Returns the operation, and the innermost line of the library, or of what runs it, that asked for it."""
    frame: FrameType | None = sys._getframe(1)
    fallback = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        line = f"{path.name}:{frame.f_lineno}"
        if _LIBRARY in path.parents:
            return f"{func} at {line}"
        if _TESTS in path.parents and path != Path(__file__) and not fallback:
            fallback = line
        frame = frame.f_back
    return f"{func} at {fallback}"


def moved(value: T, device: torch.device) -> T:
    """Returns a copy of an object with all its tensors on a device: those that it holds however deep."""
    return _moved(value, device, {})


def _moved(value: Any, device: torch.device, done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, nn.Module):
        copied: Any = copy.deepcopy(value).to(device)
    elif isinstance(value, Tensor):
        copied = value.detach().to(device).requires_grad_(value.requires_grad)
    elif isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((key, _moved(item, device, done)) for key, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        copied = type(value)(*(_moved(item, device, done) for item in value))
    elif isinstance(value, (list, tuple)):
        copied = type(value)(_moved(item, device, done) for item in value)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, Callable)):  # type: ignore[arg-type]
        copied = copy.copy(value)
        done[id(value)] = copied
        for name, item in vars(value).items():
            object.__setattr__(copied, name, _moved(item, device, done))
    else:
        copied = value
    done[id(value)] = copied
    return copied
