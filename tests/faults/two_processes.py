"""Two processes that resume one run at the same moment: one goes on, the other is refused and touches nothing."""

from __future__ import annotations

import multiprocessing
import random
import re
import shutil
import signal
import socket
from functools import partial
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

from hypertorch.errors import CheckpointError
from hypertorch.outer.reporting import loggers
from tests.faults import kills
from tests.faults.campaign import FaultError, outcome
from tests.faults.runs import Run

_REFUSED = 3  # an exit code
_PATIENCE = 60.0  # seconds


def meet(run: Run, folder: Path, num_trials: int, seed: int) -> int:
    """Returns how many trials there were in which one of two was refused by the name of the other.

    Args:
        run: the run of which each trial kills one process before, so that the name of a dead writer is there.
        folder: where its folders go.
        num_trials: how many times.
        seed: of the moment at which that one is killed.

    Raises:
        FaultError: if both went on, both were refused, the name is wrong, or the outcome is not the undisturbed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator, context = random.Random(seed), multiprocessing.get_context("fork")
    _check(kills.exit_code(kills.start(run.go_on, folder / "undisturbed", folder / "log")) == 0, "undisturbed")
    expected, named = outcome(folder / "undisturbed"), 0
    for trial in range(num_trials):
        place, barrier, is_refused = folder / str(trial), context.Barrier(2), context.Event()
        aim = partial(kills.half_a_checkpoint, generator.randint(1, 9))
        killed = kills.start(run.go_on, place, folder / "log", aim)
        _check(kills.exit_code(killed) == -signal.SIGKILL, "the first process is to be killed")

        go_on = partial(_go_on, run, barrier, is_refused, folder / f"{trial}.refused")
        children = [kills.start(go_on, place, folder / "log") for _ in range(2)]
        codes = [kills.exit_code(child) for child in children]
        _check(sorted(codes) == [0, _REFUSED], f"trial {trial}: exit codes {codes}")
        message = (folder / f"{trial}.refused").read_text()
        found = re.search(r"is being written by process (\d+) on '(.*)' since 20", message)
        winner = children[codes.index(0)]
        named += found is not None and (int(found[1]), found[2]) == (winner, socket.gethostname())
        _check(found is None or int(found[1]) == winner, f"trial {trial}: {message}, not {winner}")
        _check(outcome(place) == expected, f"trial {trial}: another outcome")
        shutil.rmtree(place)
    return named


def _go_on(run: Run, barrier: Barrier, is_refused: Event, message: Path, folder: Path) -> None:
    """Resumes the run beside the other process; the one that may go on does not end before the other has tried."""
    log = loggers.JsonLinesLogger.log

    def waiting(*args: Any) -> None:
        is_refused.wait(_PATIENCE)
        log(*args)

    loggers.JsonLinesLogger.log = waiting  # type: ignore[method-assign]
    barrier.wait()
    try:
        run.go_on(folder)
    except CheckpointError as error:
        message.write_text(str(error))
        is_refused.set()
        raise SystemExit(_REFUSED) from error


def _check(is_so: bool, what: str) -> None:
    if not is_so:
        raise FaultError(what)
