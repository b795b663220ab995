"""Measures all contestants of a work: agreement and first run, memory, then times in turns."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.benchmark import Measurement, TaskSpec

from benchmarks.agreement import relative_error
from benchmarks.code_version import commit
from benchmarks.contestant import Contestant, NotCompiled, NotMeasured, Outcome
from benchmarks.failure_reasons import CONTESTANT_FAILURES, reason
from benchmarks.job import Job
from benchmarks.machine import load_average
from benchmarks.memory import MemoryRequest, peak_bytes
from benchmarks.own_process import in_own_process
from benchmarks.row import Row
from benchmarks.timing import Rounds, Stopwatch
from benchmarks.work import Work
from hypertorch.types import TensorDict

_KINKS = 1e-2  # more than this is no matter of rounding


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How everything is measured.

    Args:
        seed: of the data.
        device: where to compute.
        dtype: of the tensors.
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
    rounds: Rounds
    tolerance: float
    memory: bool
    memory_limit: int
    longest_run: float
    longest_work: float
    contestants: Collection[str] | None = None


def measure(name: str, work: Work, size: int | None, settings: Settings, say: Callable[[str], None]) -> list[Row]:
    """Returns a row for every contestant of a work that takes part; none where nobody does.

    Memory comes first, in a process for each, so that what does not fit or takes too long is known before all of them
    are run together. Then one more process takes their times, and compares their hypergradients.

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
    say(f"times of {len(able)} contestants")
    request = TimesRequest(work=work, rows=able, settings=settings, num_threads=torch.get_num_threads())
    try:
        timed = in_own_process(timed_here, request, settings.longest_work)
    except NotMeasured as error:
        timed = [_without(row, error) for row in able]
    by_name, load = {row.contestant: row for row in timed}, load_average()
    return [replace(by_name.get(row.contestant, row), load_average=load and load[0]) for row in rows]


@dataclass(frozen=True, kw_only=True)
class TimesRequest:
    """Whose times are wanted.

    Args:
        work: the work.
        rows: of the contestants that take part.
        settings: how to measure.
        num_threads: threads of PyTorch's operations.
    """

    work: Work
    rows: list[Row]
    settings: Settings
    num_threads: int


def timed_here(request: TimesRequest) -> list[Row]:
    """Returns the rows with times and errors, measured in this process.

    Each contestant runs once, apart: that run shows the hypergradient, and compiles where there is something to
    compile. Then all run in turns, except those whose first run was long enough to be their time.
    """
    torch.set_num_threads(request.num_threads)
    settings, contestants = request.settings, request.work.contestants()
    job = request.work.job(seed=settings.seed, device=settings.device, dtype=settings.dtype)
    stopwatch = Stopwatch(device=settings.device)
    rows = {row.contestant: row for row in request.rows}
    reference: tuple[str, TensorDict] | None = None
    refusal: NotCompiled | None = None
    warm: dict[str, Callable[[], Outcome]] = {}
    for key, row in rows.items():
        contestant = contestants[key]
        if contestant.compiles and refusal is not None:
            # The library remembers what it could not compile, and would run it without, silently.
            rows[key] = _without(row, refusal)
            continue
        try:
            rows[key], outcome = _first_run(row, contestant, job, stopwatch)
        except CONTESTANT_FAILURES as error:
            rows[key] = _without(row, error)
            refusal = error if isinstance(error, NotCompiled) else refusal
            continue
        seconds = rows[key].first_seconds or 0.0
        if contestant.prepares(job) or seconds < settings.rounds.longest:
            warm[key] = partial(contestant.run, job)
        else:
            rows[key] = replace(rows[key], median_seconds=seconds, min_seconds=seconds, repetitions=1)
        if outcome.grads is not None:
            reference = reference or (key, outcome.grads)
            rows[key] = _compared(rows[key], outcome.grads, reference, request)
    for key, times in settings.rounds.times(warm, stopwatch).items():
        measured = Measurement(number_per_run=1, raw_times=times, task_spec=TaskSpec(stmt=key, setup=""))
        rows[key] = replace(
            rows[key],
            median_seconds=measured.median,
            min_seconds=min(times),
            spread_seconds=measured.iqr,
            repetitions=len(times),
        )
    return list(rows.values())


def _with_memory(row: Row, work: Work, settings: Settings) -> Row:
    request = MemoryRequest(
        work=work,
        contestant=row.contestant,
        seed=settings.seed,
        device=settings.device.type,
        dtype=settings.dtype,
        num_threads=torch.get_num_threads(),
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


def _first_run(row: Row, contestant: Contestant, job: Job, stopwatch: Stopwatch) -> tuple[Row, Outcome]:
    outcomes: list[Outcome] = []
    seconds = stopwatch.seconds(lambda: outcomes.append(contestant.run(job)))
    return replace(row, first_seconds=seconds, figures=outcomes[0].figures), outcomes[0]


def _compared(row: Row, grads: TensorDict, reference: tuple[str, TensorDict], request: TimesRequest) -> Row:
    """Returns the row with its error, and where that is beyond the tolerance, the error in float64.

    Rounding moves an activation over the kink of a `relu` or to another winner of a `max_pool` here and there: two
    contestants are then both right, at points that differ by rounding. In float64 that hardly happens.
    """
    whose, expected = reference
    tolerance = request.settings.tolerance
    error, exact = relative_error(grads, expected), None
    if tolerance < error < _KINKS and request.settings.dtype is torch.float32:
        exact = _error_in_float64(row.contestant, whose, request)
    agrees = error <= tolerance or (exact is not None and exact <= tolerance)
    return replace(row, error=error, error_in_float64=exact, reference=whose, agrees=agrees)


def _error_in_float64(contestant: str, reference: str, request: TimesRequest) -> float | None:
    contestants, settings = request.work.contestants(), request.settings
    job = request.work.job(seed=settings.seed, device=settings.device, dtype=torch.float64)
    try:
        found, expected = (contestants[name].run(job).grads for name in (contestant, reference))
    except CONTESTANT_FAILURES:
        return None
    return None if found is None or expected is None else relative_error(found, expected)
