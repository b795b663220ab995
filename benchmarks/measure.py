"""Measures all contestants of a work: memory, first runs and agreement, then times in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Measurement, TaskSpec

from benchmarks.agreement import relative_error
from benchmarks.code_version import commit
from benchmarks.contestant import NotMeasured
from benchmarks.failure_reasons import CONTESTANT_FAILURES, reason
from benchmarks.machine import load_average
from benchmarks.memory import MemoryRequest, peak_bytes
from benchmarks.row import Row
from benchmarks.timing import Rounds, Turn
from benchmarks.turns import Turns, TurnsRequest
from benchmarks.work import Work
from benchmarks.worker import Worker, start
from hypertorch.types import TensorDict

_KINKS = 1e-2  # more than this is no matter of rounding


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How everything is measured.

    Args:
        seed: of the data.
        device: where to compute.
        dtype: of the tensors.
        num_threads: threads of every contestant, and cores that its process is kept on; None for its own choice.
        rounds: how repetitions are made.
        tolerance: largest relative error of a hypergradient that agrees.
        memory: whether peak memory is measured, which needs a process for every contestant.
        memory_limit: bytes that a contestant may take beside the data.
        longest_run: seconds that one run may take, in the process for the memory.
        longest_work: seconds that the times of a work may take.
        contestants: names of those that take part; None for all.
    """

    seed: int
    device: torch.device
    dtype: torch.dtype
    num_threads: int | None
    rounds: Rounds
    tolerance: float
    memory: bool
    memory_limit: int
    longest_run: float
    longest_work: float
    contestants: Collection[str] | None = None


def measure(name: str, work: Work, size: int | None, settings: Settings, say: Callable[[str], None]) -> list[Row]:
    """Returns a row for every contestant of a work that takes part; none where nobody does.

    Memory comes first, in a process for each, so that what does not fit or takes too long is known before the others
    wait for it. Then a process for each shows its first run and its hypergradient, and all have turns.

    Args:
        name: of the work or sweep.
        work: the work.
        size: the swept size; None outside a sweep.
        settings: how to measure.
        say: is told what is being done.
    """
    # Before anything runs, since every process reads the code anew.
    code = commit()
    rows = [
        Row(
            work=name,
            title=work.title,
            size=size,
            contestant=key,
            library=contestant.library,
            side=contestant.side,
            commit=code,
        )
        for key, contestant in work.contestants().items()
        if settings.contestants is None or key in settings.contestants
    ]
    if not rows:
        return []
    if settings.memory:
        for place, row in enumerate(rows):
            say(f"memory: {row.contestant}")
            rows[place] = _with_memory(row, work, settings)
    able = [row for row in rows if not row.notes]
    with tempfile.TemporaryDirectory() as folder:
        timed = _Timing(work=work, settings=settings, folder=Path(folder), say=say).rows(able)
    by_name, load = {row.contestant: row for row in timed}, load_average()
    return [replace(by_name.get(row.contestant, row), load_average=load and load[0]) for row in rows]


class _Timing:
    """First runs, agreement and times of the contestants of a work, each in a process of its own.

    Each process runs once, apart: that run shows the hypergradient, and compiles where there is something to compile.
    What compiles then runs once in a second process. Then all have turns, except those whose first run was long enough
    to be their time.
    """

    def __init__(self, *, work: Work, settings: Settings, folder: Path, say: Callable[[str], None]) -> None:
        self._work, self._settings, self._folder, self._say = work, settings, folder, say
        self._ends = time.monotonic() + settings.longest_work
        self._contestants = work.contestants()
        self._reference: tuple[str, TensorDict] | None = None
        self._processes = 0

    def rows(self, rows: Collection[Row]) -> list[Row]:
        """Returns the rows with what was found."""
        measured: dict[str, Row] = {}
        with ExitStack() as open_workers:
            turns: dict[str, Turn] = {}
            for row in rows:
                key = row.contestant
                self._say(f"first run: {key}")
                with ExitStack() as own_workers:
                    try:
                        measured[key], worker = self._first_runs(row, own_workers)
                    except CONTESTANT_FAILURES as error:
                        measured[key] = _without(row, error)
                        continue
                    if worker is not None:
                        turns[key] = worker.turn
                        open_workers.push(own_workers.pop_all())
            self._say(f"times of {len(turns)} contestants")
            try:
                times = self._settings.rounds.times(turns, self._settings.seed)
            except CONTESTANT_FAILURES as error:
                return [_without(row, error) if key in turns else row for key, row in measured.items()]
        return [_with_times(row, times[key]) if key in times else row for key, row in measured.items()]

    def _first_runs(self, row: Row, opened: ExitStack) -> tuple[Row, Worker | Turns | None]:
        """Returns the row with what first runs show, and the process that goes on; None where the first run is all."""
        contestant, settings = self._contestants[row.contestant], self._settings
        caches = self._new_folder()
        worker = self._start(row.contestant, settings.dtype, caches, opened, on_all_cores=contestant.compiles)
        first = worker.first()
        row = replace(row, first_seconds=first.seconds, figures=first.figures)
        if first.grads is not None:
            self._reference = self._reference or (row.contestant, first.grads)
            row = self._compared(row, first.grads, self._reference)
        if contestant.compiles:
            worker.close()
            worker = self._start(row.contestant, settings.dtype, caches, opened)
            row = replace(row, second_process_seconds=worker.first().seconds)
        elif first.seconds < settings.rounds.longest:
            row = replace(row, **worker.counts())
        if first.prepares or first.seconds < settings.rounds.longest:
            return row, worker
        return _with_times(row, [first.seconds]), None

    def _start(
        self, contestant: str, dtype: torch.dtype, caches: Path, opened: ExitStack, *, on_all_cores: bool = False
    ) -> Worker | Turns:
        settings = self._settings
        request = TurnsRequest(
            work=self._work,
            contestant=contestant,
            seed=settings.seed,
            device=str(settings.device),
            dtype=dtype,
            num_threads=settings.num_threads,
        )
        folder = self._new_folder()
        worker = start(request, folder=folder, caches=caches, ends=self._ends, on_all_cores=on_all_cores)
        opened.callback(worker.close)
        return worker

    def _new_folder(self) -> Path:
        self._processes += 1
        return self._folder / str(self._processes)

    def _compared(self, row: Row, grads: TensorDict, reference: tuple[str, TensorDict]) -> Row:
        """Returns the row with its error, and where that is beyond the tolerance, the error in float64.

        Rounding moves an activation over the kink of a `relu` or to another winner of a `max_pool` here and there: two
        contestants are then both right, at points that differ by rounding. In float64 that hardly happens.
        """
        whose, expected = reference
        tolerance = self._settings.tolerance
        error, exact = relative_error(grads, expected), None
        if tolerance < error < _KINKS and self._settings.dtype is torch.float32:
            exact = self._error_in_float64(row.contestant, whose)
        agrees = error <= tolerance or (exact is not None and exact <= tolerance)
        return replace(row, error=error, error_in_float64=exact, reference=whose, agrees=agrees)

    def _error_in_float64(self, contestant: str, reference: str) -> float | None:
        found: list[TensorDict | None] = []
        for name in (contestant, reference):
            with ExitStack() as opened:
                try:
                    found.append(self._start(name, torch.float64, self._new_folder(), opened).first().grads)
                except CONTESTANT_FAILURES:
                    return None
        grads, expected = found
        return None if grads is None or expected is None else relative_error(grads, expected)


def _with_times(row: Row, times: Sequence[float]) -> Row:
    measured = Measurement(number_per_run=1, raw_times=list(times), task_spec=TaskSpec(stmt=row.contestant, setup=""))
    return replace(
        row,
        median_seconds=measured.median,
        min_seconds=min(times),
        lower_quartile_seconds=float(np.quantile(times, 0.25)),
        upper_quartile_seconds=float(np.quantile(times, 0.75)),
        repetitions=len(times),
    )


def _with_memory(row: Row, work: Work, settings: Settings) -> Row:
    request = MemoryRequest(
        work=work,
        contestant=row.contestant,
        seed=settings.seed,
        device=settings.device.type,
        dtype=settings.dtype,
        num_threads=settings.num_threads,
        limit=settings.memory_limit,
        longest=settings.longest_run,
    )
    try:
        return replace(row, peak_bytes=peak_bytes(request))
    except NotMeasured as error:
        return _without(row, error)


def _without(row: Row, error: BaseException) -> Row:
    """Returns the row with the reason why it was not measured."""
    return replace(row, notes=(*row.notes, f"not measured: {reason(error)}"))
