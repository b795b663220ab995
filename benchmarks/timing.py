"""Times of several contestants, taken in turns."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]
Turn = Callable[[int], float]
"""From a number of runs in a row to their mean time (unit: seconds)."""


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Times a run on a device: by the clock on a CPU, by events in the device's own stream on a GPU.

    Args:
        device: where the run computes.
    """

    device: torch.device

    def seconds(self, run: Run, number: int = 1) -> float:
        """Returns the mean time of `number` runs in a row (unit: seconds)."""
        # The graphs of some libraries hold cycles, which nobody frees before the next collection.
        gc.collect()
        if self.device.type == "cuda":
            return self._event_seconds(run, number) / number
        start = time.perf_counter()
        for _ in range(number):
            run()
        return (time.perf_counter() - start) / number

    def _event_seconds(self, run: Run, number: int) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(number):
            run()
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) / 1e3


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How repetitions are made: in each round every contestant has a turn, in an order drawn anew.

    What disturbs the machine for a while then disturbs all of them, and none always runs behind the same neighbour.

    Args:
        repetitions: rounds.
        shortest: a repetition is as many runs in a row as take at least so long (unit: seconds).
        longest: a contestant takes no part in further rounds once it has run for so long (unit: seconds). Of what takes
            longer by itself, the run to warm up is its only one.
    """

    repetitions: int
    shortest: float
    longest: float

    def times(self, turns: Mapping[str, Turn], seed: int) -> dict[str, list[float]]:
        """Returns the time of one run in each repetition, by contestant.

        Args:
            turns: of contestants that are warm.
            seed: of the orders.
        """
        times: dict[str, list[float]] = {name: [] for name in turns}
        numbers: dict[str, int] = {}
        for name, turn in turns.items():
            warming = turn(1)
            numbers[name] = max(1, math.ceil(self.shortest / max(warming, 1e-6)))
            if warming >= self.longest:
                times[name].append(warming)
        names, orders = list(turns), random.Random(seed)
        for _ in range(self.repetitions):
            orders.shuffle(names)
            for name in names:
                if sum(times[name]) * numbers[name] < self.longest:
                    times[name].append(turns[name](numbers[name]))
        return times
