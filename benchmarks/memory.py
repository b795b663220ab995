"""Peak memory of a contestant, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestant import NotMeasured
from benchmarks.failure_reasons import CONTESTANT_FAILURES, is_out_of_memory, reason
from benchmarks.job import Job
from benchmarks.own_process import in_own_process
from benchmarks.tables import byte_words
from benchmarks.turns import TurnsRequest
from benchmarks.work import Work
from benchmarks.worker import start

try:
    import psutil  # pyright: ignore[reportMissingModuleSource]
except ImportError:  # of the extra `benchmark`
    psutil: Any = None
try:
    import resource
except ImportError:  # Windows has none
    resource: Any = None

_MMAP_THRESHOLD = -3  # the number of this option in glibc's malloc.h
_OWN_MAPPING_FROM = 2**16
_PROCESSES = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """Whose memory is wanted.

    Args:
        work: the work.
        contestant: its contestant, by name.
        seed: of the data.
        device: "cpu" or "cuda".
        dtype: of the tensors.
        num_threads: threads; None for each library's own choice.
        limit: bytes that the process may take beside its data (on a CPU); the run fails beyond.
        longest: seconds after which the process is ended.
    """

    work: Work
    contestant: str
    seed: int
    device: str
    dtype: torch.dtype
    num_threads: int | None
    limit: int
    longest: float


def peak_bytes(request: MemoryRequest) -> int:
    """Returns the peak memory of one run above what the process held before it, measured in a new process.

    Raises:
        NotMeasured: if it could not be measured; says why.
    """
    if psutil is None:
        raise NotMeasured("psutil is not installed (it comes with the extra `benchmark`)")
    if request.work.contestants()[request.contestant].own_framework:
        return _peak_of_worker(request)
    return in_own_process(peak_bytes_here, request, request.longest)


def available_bytes() -> int | None:
    """Returns the memory that is free for a process; None without psutil."""
    return None if psutil is None else int(psutil.virtual_memory().available)


def peak_bytes_here(request: MemoryRequest) -> int:
    """Returns the peak memory of one run in this process, above what the process held before it.

    On a CPU: the largest resident set during the run minus that before it, with a C library that gives freed blocks
    back to the system at once, where it can be told so: what it keeps by default depends on the order of allocations,
    is up to as much again, and differs from run to run. Before it come what is no memory of the work: imports, data,
    libraries' own buffers (a run of the same work in tiny sizes), compilation and the choice of a task route (a run of
    the work itself, whose memory is then given back). On a GPU: the allocator's peak minus what was allocated before.

    Raises:
        NotMeasured: if the run failed; says why.
    """
    if request.num_threads is not None:
        torch.set_num_threads(request.num_threads)
    device = torch.device(request.device)
    keep_no_freed_blocks()
    contestant = request.work.contestants()[request.contestant]
    job = _job(request.work, request, device)
    try:
        contestant.run(job if contestant.prepares(job) else _job(request.work.tiny(), request, device))
        if device.type == "cuda":
            return _cuda_peak(lambda: contestant.run(job), device)
        return _resident_peak(lambda: contestant.run(job), request.limit)
    except CONTESTANT_FAILURES as error:
        if is_out_of_memory(error):
            raise NotMeasured(f"needs more than {byte_words(request.limit)}") from error
        raise NotMeasured(reason(error)) from error


def _peak_of_worker(request: MemoryRequest) -> int:
    """Returns the peak memory of a process without PyTorch, read from outside: that of a run after its first one."""
    turns = TurnsRequest(
        work=request.work,
        contestant=request.contestant,
        seed=request.seed,
        device=request.device,
        dtype=request.dtype,
        num_threads=request.num_threads,
    )
    with tempfile.TemporaryDirectory() as name:
        folder, ends = Path(name), time.monotonic() + request.longest
        environment = {"MALLOC_MMAP_THRESHOLD_": str(_OWN_MAPPING_FROM)}
        worker = start(turns, folder=folder / "run", caches=folder / "caches", ends=ends, environment=environment)
        try:
            worker.ask("ready")
            _limit_memory(request.limit, worker.pid)
            worker.first()
            worker.ask("trim")
            before = psutil.Process(worker.pid).memory_info().rss
            _forget_peak(worker.pid)
            worker.turn(1)
            return max(_peak_resident(worker.pid) - before, 0)
        except NotMeasured as error:
            if is_out_of_memory(error):
                raise NotMeasured(f"needs more than {byte_words(request.limit)}") from error
            raise
        finally:
            worker.close()


def _job(work: Work, request: MemoryRequest, device: torch.device) -> Job:
    return work.job(seed=request.seed, device=device, dtype=request.dtype)


def _cuda_peak(run: Any, device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _resident_peak(run: Any, limit: int) -> int:
    gc.collect()
    _give_back_freed_memory()
    _limit_memory(limit)
    before = psutil.Process().memory_info().rss
    _forget_peak()
    run()
    return max(_peak_resident() - before, 0)


def keep_no_freed_blocks() -> None:
    """Makes the C library map every block of some size by itself and unmap it when freed, where it can (glibc)."""
    set_option = _of_c_library("mallopt")
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _OWN_MAPPING_FROM)


def _give_back_freed_memory() -> None:
    """Returns freed memory to the system, where the C library can: kept, it would hide what the run takes."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _limit_memory(limit: int, pid: int | None = None) -> None:
    """Makes allocations beyond the limit fail in a process, by default this, instead of all else on the machine."""
    if sys.platform == "linux":
        now = _status_bytes("VmData", pid)
        resource.prlimit(pid or 0, resource.RLIMIT_DATA, (now + limit, resource.RLIM_INFINITY))


def _forget_peak(pid: int | None = None) -> None:
    """Starts the system's record of the largest resident set anew; elsewhere than on Linux it is since the start."""
    if _PROCESSES.exists():
        (_PROCESSES / _name(pid) / "clear_refs").write_text("5")


def _peak_resident(pid: int | None = None) -> int:
    if _PROCESSES.exists():
        return _status_bytes("VmHWM", pid)
    if pid is not None:
        raise NotMeasured("the system does not say what another process has taken")
    # macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status_bytes(key: str, pid: int | None) -> int:
    lines = (_PROCESSES / _name(pid) / "status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _name(pid: int | None) -> str:
    return "self" if pid is None else str(pid)
