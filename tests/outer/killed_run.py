"""Runs in processes of their own that get a signal in the middle; called as `killed_run FOLDER NUM_STEPS`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import hypertorch as ht
from hypertorch import outer
from tests.outer.problems import Quadratics
from tests.outer.runs import full_loop


@dataclass(frozen=True, kw_only=True)
class Signalling(Quadratics):
    """Sends this process a signal when the problem of a step is asked for."""

    number: int
    step: int

    def at(self, outer_step: int) -> ht.BilevelProblem:
        if outer_step == self.step:
            os.kill(os.getpid(), self.number)
        return super().at(outer_step)


class HalfLine(outer.Logger):
    """Leaves the torn line behind that a kill in the middle of a write would leave."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._step = path, step

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if step == self._step:
            with self._path.open("a") as file:
                file.write('{"step": 1')

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


SIGNALS = {"kill": (signal.SIGKILL, 13), "terminate": (signal.SIGTERM, 3), "interrupt": (signal.SIGINT, 8)}
"""What is sent, and the outer step at which."""


def run(folder: Path, num_steps: int, number: int, step: int) -> None:
    loggers: list[outer.Logger] = [outer.JsonLinesLogger(folder / "metrics.jsonl")]
    if number == signal.SIGKILL:
        loggers.append(HalfLine(folder / "metrics.jsonl", step - step % 2))
    full_loop(folder, Signalling(number=number, step=step), loggers=loggers).run(num_steps)


def main(folder: Path, num_steps: int) -> None:
    """Starts one process per signal, by fork, so that torch is imported once; prints what each returned."""
    torch.set_num_threads(1)
    for name, (number, step) in SIGNALS.items():
        child = os.fork()
        if child == 0:
            # Python itself would turn an interrupt into a traceback, and the exit status into 1.
            try:
                run(folder / name, num_steps, number, step)
            except KeyboardInterrupt:
                os._exit(130)
            os._exit(0)
        sys.stdout.write(f"{name} {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
