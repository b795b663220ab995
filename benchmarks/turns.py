"""The turns of a contestant, in the process where it runs: `python -m benchmarks.turns FOLDER` is such a process."""

from __future__ import annotations

import gc
import json
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from benchmarks.contestant import Outcome
from benchmarks.failure_reasons import CONTESTANT_FAILURES, reason
from benchmarks.operations import counted
from benchmarks.timing import Stopwatch
from benchmarks.work import Work
from hypertorch.types import TensorDict

REQUEST, GRADS = "request.pickle", "grads.npz"


@dataclass(frozen=True, kw_only=True)
class TurnsRequest:
    """Who is to run what.

    Args:
        work: the work.
        contestant: its contestant, by name.
        seed: of the data.
        device: where to compute, such as "cpu".
        dtype: of the tensors.
        num_threads: threads, and cores that the process is kept on; None for each library's own choice.
    """

    work: Work
    contestant: str
    seed: int
    device: str
    dtype: torch.dtype
    num_threads: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstRun:
    """The first run in a process.

    Attributes:
        seconds: its time, with compilation where there is one.
        grads: the hypergradient; None from the floor.
        prepares: whether it did what no later run does.
        figures: what the contestant counted itself.
    """

    seconds: float
    grads: TensorDict | None
    prepares: bool
    figures: dict[str, float] = field(default_factory=dict)


class Turns:
    """A contestant with its data, ready to run.

    Args:
        request: who is to run what.
    """

    def __init__(self, request: TurnsRequest) -> None:
        if request.num_threads is not None:
            torch.set_num_threads(request.num_threads)
        device = torch.device(request.device)
        self._contestant = request.work.contestants()[request.contestant]
        self._job = request.work.job(seed=request.seed, device=device, dtype=request.dtype)
        self._stopwatch = Stopwatch(device=device)

    def first(self) -> FirstRun:
        """Returns what the first run gave."""
        outcomes: list[Outcome] = []
        seconds = self._stopwatch.seconds(lambda: outcomes.append(self._contestant.run(self._job)))
        return FirstRun(
            seconds=seconds,
            grads=outcomes[0].grads,
            prepares=self._contestant.prepares(self._job),
            figures=dict(outcomes[0].figures),
        )

    def turn(self, number: int) -> float:
        """Returns the mean time of `number` runs in a row (unit: seconds)."""
        return self._stopwatch.seconds(lambda: self._contestant.run(self._job), number)

    def counts(self) -> dict[str, int]:
        """Returns the operations of a run and the bytes that they move."""
        return counted(lambda: self._contestant.run(self._job))

    def close(self) -> None:
        """Does nothing: there is no other process."""


def main() -> None:
    """Answers the lines of stdin until it ends, each by a line of JSON.

    "ready" when everything is loaded; "first" for the first run, whose hypergradient is left in the folder; "turn N";
    "counts". A run that fails is answered by `{"reason": ...}`.
    """
    folder, answers = Path(sys.argv[1]), sys.stdout
    sys.stdout = sys.stderr  # which is where what a library prints does no harm
    turns = Turns(pickle.loads((folder / REQUEST).read_bytes()))
    # What the imports made lives on: collections in what is measured need not look at it.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        _answer(turns, folder, line.split(), answers)


def _answer(turns: Turns, folder: Path, words: list[str], answers: TextIO) -> None:
    try:
        answer = _answered(turns, folder, words)
    except CONTESTANT_FAILURES as error:
        answer = {"reason": reason(error)}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _answered(turns: Turns, folder: Path, words: list[str]) -> dict[str, object]:
    match words:
        case ["first"]:
            run = turns.first()
            if run.grads is not None:
                arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in run.grads.items()}
                np.savez(folder / GRADS, **arrays)
            return {"seconds": run.seconds, "prepares": run.prepares, "figures": run.figures}
        case ["turn", number]:
            return {"seconds": turns.turn(int(number))}
        case ["counts"]:
            return dict(turns.counts())
    return {}


if __name__ == "__main__":
    main()
