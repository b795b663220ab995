"""Time of a run, and its speed between two looks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures how long a run takes and how fast its steps are.

    Args:
        seconds: run time before (of the runs that this one resumes).
        step: steps done before.
    """

    def __init__(self, *, seconds: float, step: int) -> None:
        self._start = time.perf_counter() - seconds
        self._last_look = time.perf_counter()
        self._last_step = step

    @property
    def seconds(self) -> float:
        """Run time so far, that of earlier runs included."""
        return time.perf_counter() - self._start

    def rate(self, step: int) -> float:
        """Returns the steps per second since the last call, without excluded time."""
        now = time.perf_counter()
        # The clock may be too coarse for a very short step: no division by zero.
        rate = (step - self._last_step) / max(now - self._last_look, 1e-9)
        self._last_look, self._last_step = now, step
        return rate

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the time of the block from the speed, not from the run time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            # The look moves on by as much as the block took, so that the interval since is without it.
            self._last_look += time.perf_counter() - start
