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
        """Returns the steps per second since the last call, time excluded left out."""
        now = time.perf_counter()
        # A clock may be too coarse for a very short step.
        rate = (step - self._last_step) / max(now - self._last_look, 1e-9)
        self._last_look, self._last_step = now, step
        return rate

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leaves the time that the block takes out of the speed, not out of the run time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._last_look += time.perf_counter() - start
