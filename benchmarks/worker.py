"""A process with one contestant, which runs whenever the benchmark asks it to."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contestant import NotMeasured
from benchmarks.turns import GRADS, REQUEST, FirstRun, TurnsRequest

_ROOT = Path(__file__).resolve().parents[1]
_LONGEST_WAIT = 2e6  # a timer counts in 64 bits of nanoseconds, and some systems in 32 of milliseconds (unit: seconds)
_PATIENCE = 10.0  # seconds that an idle process may take to end


class Worker:
    """The turns of a contestant in a process of its own, by lines over a pipe.

    Args:
        command: the command of the process.
        folder: where it leaves its hypergradient and what it says on stderr.
        environment: variables beside those of this process.
        num_cores: cores that it is kept on, where the system can; None for all.
        ends: when it must have answered everything, on the clock of `time.monotonic`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        num_cores: int | None,
        ends: float,
    ) -> None:
        self._folder, self._ends, self._longest = folder, ends, ends - time.monotonic()
        with (folder / "stderr").open("wb") as errors, _kept_on(num_cores):
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=_ROOT,
                env={**os.environ, **environment},
                text=True,
            )

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def first(self) -> FirstRun:
        """Returns what the first run gave; loading what it needs does not count to its time.

        Raises:
            NotMeasured: if the run failed, or took too long.
        """
        self.ask("ready")
        answer = self.ask("first")
        grads = None
        if (self._folder / GRADS).exists():
            with np.load(self._folder / GRADS) as held:
                grads = {name: torch.from_numpy(held[name]) for name in held}
        return FirstRun(**answer, grads=grads)

    def turn(self, number: int) -> float:
        """Returns the mean time of `number` runs in a row (unit: seconds); raises as `first` does."""
        return self.ask(f"turn {number}")["seconds"]

    def counts(self) -> dict[str, int]:
        """Returns the operations of a run and the bytes that they move; raises as `first` does."""
        return self.ask("counts")

    def ask(self, words: str) -> dict[str, Any]:
        """Returns the answer to a line.

        Raises:
            NotMeasured: if the run failed, the process ended, or the time is over.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        left = min(max(self._ends - time.monotonic(), 0.0), _LONGEST_WAIT)
        timer = threading.Timer(left, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(words + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise NotMeasured(self._why_it_ended())
        answer = json.loads(line)
        if "reason" in answer:
            raise NotMeasured(answer["reason"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # What could not be written to a process that has ended is written once more when the pipe is closed.
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if time.monotonic() >= self._ends:
            return f"takes more than {self._longest:.3g} s"
        if code < 0:
            return f"its process was ended by signal {-code}"
        lines = (self._folder / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"its process failed ({lines[-1] if lines else 'without a word'})"


def start(
    request: TurnsRequest,
    *,
    folder: Path,
    caches: Path,
    ends: float,
    environment: Mapping[str, str] | None = None,
    on_all_cores: bool = False,
) -> Worker:
    """Returns a new process with a contestant.

    Args:
        request: who is to run what.
        folder: an empty one, for what the process is told and leaves.
        caches: of compiled programs: an empty one for a process that must compile, that of an earlier process for one
            that finds what was compiled there.
        ends: when it must have answered everything, on the clock of `time.monotonic`.
        environment: further variables.
        on_all_cores: leave the process all cores, whatever the request's number of threads: a compiler takes several.

    Raises:
        NotMeasured: if what the contestant needs is missing.
    """
    contestant = request.work.contestants()[request.contestant]
    device = torch.device(request.device)
    folder.mkdir()
    if contestant.own_framework:
        job = request.work.job(seed=request.seed, device=device, dtype=request.dtype)
        command = contestant.command(job, folder)
    else:
        (folder / REQUEST).write_bytes(pickle.dumps(request))
        command = [sys.executable, "-m", "benchmarks.turns", str(folder)]
    variables = {**_caches_in(caches), **_threads(request.num_threads), **(environment or {})}
    num_cores = None if on_all_cores else request.num_threads
    return Worker(command, folder=folder, environment=variables, num_cores=num_cores, ends=ends)


def _caches_in(folder: Path) -> dict[str, str]:
    """Returns the variables that name the caches of compiled programs, JAX's for the shortest compilation too."""
    return {
        "XDG_CACHE_HOME": str(folder / "user"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def _threads(number: int | None) -> dict[str, str]:
    if number is None:
        return {}
    # XLA takes as many threads as there are cores to run on; one thread it must be told of.
    xla = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"} if number == 1 else {}
    return {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number), **xla}


@contextmanager
def _kept_on(number: int | None) -> Iterator[None]:
    """Keeps processes that are started inside on the last `number` cores, where the system can (Linux)."""
    if number is None or sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-number:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
