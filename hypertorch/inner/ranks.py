"""The processes of one run, of which each computes a share: started by `torchrun`, connected by `torch.distributed`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils import _pytree as pytree

from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import is_number, is_out_of_memory
from hypertorch.errors import HypertorchError, LostRankError
from hypertorch.types import TensorDict, TensorMapping

T = TypeVar("T")
_Described: TypeAlias = tuple[type[Exception], tuple[object, ...], dict[str, object]]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ALIGNMENT = 16  # bytes: the widest entry of a tensor
_FAILED = "a process failed"
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The place of this process among those of one run; `join_ranks` makes it.

    Every method but `share` and `shares` is a collective: each process must call it, in the same order.

    Args:
        rank: number of this process, from 0.
        size: how many there are.

    Raises:
        TypeError: if one is no whole number.
        ValueError: if there is no such place.
    """

    rank: int
    size: int

    def __post_init__(self) -> None:
        check_fields(self, "rank", "size")
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"`rank` is {self.rank!r} of `size` {self.size!r}: processes count from 0. Take the ranks that "
                "`ht.join_ranks()` gives."
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def shares(self, count: int) -> list[range]:
        """Returns which of `count` pieces of work each process takes: consecutive ones, of equal length or one more."""
        least, surplus = divmod(count, self.size)
        starts = [rank * least + min(rank, surplus) for rank in range(self.size + 1)]
        return [range(start, stop) for start, stop in pairwise(starts)]

    def share(self, count: int) -> range:
        """Returns which of `count` pieces of work this process takes."""
        return self.shares(count)[self.rank]

    def together(self, compute: Callable[[], T]) -> T:
        """Returns what `compute` returns here, once it has returned everywhere; raises as `gather` does."""
        found: list[T] = []

        def run() -> TensorDict:
            found.append(compute())
            return {}

        self.gather(run, {})
        return found[0]

    def gather(
        self, compute: Callable[[], TensorMapping], like: TensorMapping, *, rows: Mapping[str, int] | None = None
    ) -> list[TensorDict]:
        """Returns the tensors that `compute` returns on every process, in the order of the ranks.

        All go through one buffer of bytes: a tensor of any dtype arrives as it was.

        Cost: one collective, and memory for the tensors of all processes.

        Args:
            compute: returns tensors.
            like: tensors of their names, dtypes, devices and shapes.
            rows: names of tensors of which each process has its share of rows, with how many all have together.

        Raises:
            HypertorchError: what `compute` raised, on every process, if it raised on any: the first one's.
            RuntimeError: likewise, if memory was too small anywhere.
        """
        own, failure = _attempt(compute)
        packed = {_FAILED: torch.tensor([failure is not None], dtype=torch.uint8), **(like if own is None else own)}
        like = {_FAILED: packed[_FAILED], **like}
        tables = {name: self.shares(count) for name, count in (rows or {}).items()}
        layouts = [
            {
                name: (len(tables[name][rank]), *value.shape[1:]) if name in tables else tuple(value.shape)
                for name, value in like.items()
            }
            for rank in range(self.size)
        ]
        buffer = _packed(packed, max(_room(layout, like) for layout in layouts))
        found = [torch.empty_like(buffer) for _ in range(self.size)]
        with self._waiting():
            dist.all_gather(found, buffer)
        tensors = [_unpacked(one, layout, like) for one, layout in zip(found, layouts, strict=True)]
        failed = [bool(one.pop(_FAILED)) for one in tensors]
        if any(failed):
            self._raise_first(self._all_objects(_described(failure)))
        return tensors

    def objects(self, compute: Callable[[], T]) -> list[T]:
        """Returns what `compute` returns on every process, in the order of the ranks; raises as `gather` does.

        It travels by pickle, tensors by way of the host: for what is small, or of no known layout.
        """
        own, failure = _attempt(compute)
        found = self._all_objects((_on_host(own), _described(failure)))
        self._raise_first([error for _, error in found])
        return [value for value, _ in found]  # type: ignore[misc]

    def first(self, compute: Callable[[], T]) -> T:
        """Returns what `compute` returns on the first process, which alone calls it; tensors arrive on the host."""
        found = self.together(lambda: compute() if self.is_first else None)
        sent: list[Any] = [_on_host(found)]
        with self._waiting():
            dist.broadcast_object_list(sent, src=0)
        return found if self.is_first else sent[0]  # type: ignore[return-value]

    def _all_objects(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(found, value)
        return found

    def _raise_first(self, errors: list[_Described | None]) -> None:
        for error in errors:
            if error is not None:
                raise _rebuilt(error)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostRankError(
                f"process {self.rank} of {self.size} waited for the others, and one of them ended or did not answer in "
                f"time ({str(error).strip().splitlines()[0]}). The run cannot go on without it. Its own message says "
                "why it ended; the same command with `resume` goes on from the last checkpoint."
            ) from error


@contextmanager
def join_ranks(*, device: str | torch.device = "cpu", timeout: float = 600.0) -> Iterator[Ranks | None]:
    """Joins the processes that `torchrun` started, for a `with` block; gives None where this process is the only one.

        with ht.join_ranks() as ranks:
            loop = ht.OuterLoop(source, ..., execution=ht.Execution(ranks=ranks))

    A process group that exists already is used as it is. Otherwise one is made (gloo for tensors on the host, NCCL for
    tensors on GPUs) and destroyed when the block ends. On GPUs each process computes on the GPU of its local rank.

    Args:
        device: where the run computes.
        timeout: how long a process waits for the others before it gives up (unit: seconds, above 0).

    Raises:
        ValueError: if the environment is not that of `torchrun`, or a process has no GPU of its own.
        LostRankError: if the processes do not find each other in time.
    """
    if not is_number(timeout) or not 0.0 < timeout < float("inf"):
        raise ValueError(
            f"`timeout` is {timeout!r}: it is how many seconds a process waits for the others. Pass a finite number "
            "above 0."
        )
    if dist.is_initialized():
        yield _joined() if dist.get_world_size() > 1 else None
        return
    if number_of_processes() == 1:
        yield None
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ValueError(
            f"`WORLD_SIZE` is {os.environ['WORLD_SIZE']!r} in the environment, but {missing} are not there: processes "
            "cannot find each other. Start them by `torchrun`, or unset WORLD_SIZE for a run of one process."
        )
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        _take_own_gpu(int(os.environ["LOCAL_RANK"]))
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        # `torchrun` may keep the store of processes that it starts again: they would read the addresses of those that
        # are gone, and wait for them.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore(f"attempt {attempt}", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        raise LostRankError(
            f"the {os.environ['WORLD_SIZE']} processes did not find each other within {timeout:.0f} seconds ({error}). "
            "See that each of them was started, and reaches MASTER_ADDR."
        ) from error
    yield _joined()
    # Not after an error: the others may be waiting for this process, and only its end tells them.
    dist.destroy_process_group()


def arguments(hparams: TensorMapping, outer_step: int) -> Tensor:
    """Returns the step and a number for each outer variable: equal on two processes that were called alike."""
    # A sum of bits, not of numbers: any change of one entry changes it.
    sums = [value.detach().contiguous().view(-1).view(_BITS[value.element_size()]).sum() for value in hparams.values()]
    return torch.stack([torch.tensor(outer_step, device=sums[0].device), *sums])


def check_same_arguments(found: list[Tensor], names: list[str]) -> None:
    """Raises a `ValueError` unless the processes were called alike; `found` is what `arguments` returned on each."""
    first = found[0]
    for rank, other in enumerate(found):
        differing = [name for name, same in zip(["", *names], (other == first).tolist(), strict=True) if not same]
        if differing:
            what = "`outer_step`" if not differing[0] else f"`hparams[{differing[0]!r}]`"
            raise ValueError(
                f"{what} of process {rank} is not that of process 0: together they would differentiate no single "
                "problem. Give every process the same arguments; `ht.OuterLoop` starts them alike."
            )


def number_of_processes() -> int:
    """Returns how many processes `torchrun` started for this run; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"`WORLD_SIZE` is {text!r} in the environment: it is the number of processes of a run. Start them by "
            "`torchrun`, or unset it for a run of one process."
        )
    return int(text)


def _joined() -> Ranks:
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size())


def _take_own_gpu(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"`LOCAL_RANK` is {local_rank}, but this machine has {torch.cuda.device_count()} GPUs: each process needs "
            "one of its own. Start at most as many processes per machine by `torchrun --nproc-per-node`."
        )
    torch.cuda.set_device(local_rank)


def _described(error: Exception | None) -> _Described | None:
    return None if error is None else (type(error), error.args, vars(error))


def _rebuilt(error: _Described) -> Exception:
    # Not by its constructor: only the class knows the arguments of that.
    kind, arguments, attributes = error
    found = kind.__new__(kind, *arguments)
    found.args = arguments
    vars(found).update(attributes)
    return found


def _attempt(compute: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Returns the result of a function, or the error that the other processes must raise too."""
    try:
        return compute(), None
    except (HypertorchError, RuntimeError) as error:
        if not isinstance(error, HypertorchError) and not is_out_of_memory(error):
            raise
        # Without its frames, which hold what did not fit into memory.
        return None, error.with_traceback(None)


def _on_host(value: T) -> T:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value)


def _packed(tensors: TensorMapping, size: int) -> Tensor:
    """Returns the bytes of tensors, one after the other."""
    # On an accelerator if any tensor is there: its processes communicate there.
    devices = {value.device for value in tensors.values()}
    buffer = torch.zeros(size, dtype=torch.uint8, device=max(devices, key=lambda device: device.type != "cpu"))
    start = 0
    for value in tensors.values():
        content = value.detach().contiguous().view(-1).view(torch.uint8)
        buffer[start : start + len(content)] = content
        start += _aligned(len(content))
    return buffer


def _unpacked(buffer: Tensor, layout: Mapping[str, tuple[int, ...]], like: TensorMapping) -> TensorDict:
    """Returns tensors of a layout from their bytes."""
    found: TensorDict = {}
    start = 0
    for name, shape in layout.items():
        size = like[name].element_size() * math.prod(shape)
        # Copied, so that no entry keeps the whole buffer alive.
        found[name] = buffer[start : start + size].clone().view(like[name].dtype).view(shape).to(like[name].device)
        start += _aligned(size)
    return found


def _room(layout: Mapping[str, tuple[int, ...]], like: TensorMapping) -> int:
    """Returns how many bytes tensors of a layout take."""
    return sum(_aligned(like[name].element_size() * math.prod(shape)) for name, shape in layout.items())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
