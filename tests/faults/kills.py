"""How a run is killed: at a random moment by its parent, or by itself in the middle of what matters."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from optuna.storages.journal import JournalFileBackend

from hypertorch.outer.reporting import loggers
from hypertorch.outer.storage import tensor_files

Aim = Callable[[int], None]
"""Prepares a process to kill itself at the n-th moment of a kind."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Countdown:
    """Says which call is the n-th."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    def is_over(self) -> bool:
        self._left -= 1
        return self._left == 0


def _around(owner: Any, name: str, nth: int, matches: Callable[[Path], bool], *, before: bool) -> None:
    """Dies before or after the n-th call for a path that matches."""
    original, countdown = getattr(owner, name), _Countdown(nth)

    def replacement(path: Path, *args: Any, **named: Any) -> Any:
        hit = matches(path) and countdown.is_over()
        if hit and before:
            die()
        result = original(path, *args, **named)
        if hit:
            die()
        return result

    setattr(owner, name, replacement)


def _torn_tensors(beginning: str, *, temporary: bool = False) -> Aim:
    """Leaves half of a file of tensors: under its partial name, or under the one that safetensors writes to."""

    def install(nth: int) -> None:
        original, countdown = tensor_files.save_file, _Countdown(nth)

        def replacement(tensors: Any, path: Path, **named: Any) -> None:
            original(tensors, path, **named)
            if path.name.startswith(beginning) and countdown.is_over():
                half = path.read_bytes()[: path.stat().st_size // 2]
                path.unlink()
                (path.with_name(".tmpAb3dE9") if temporary else path).write_bytes(half)
                die()

        tensor_files.save_file = replacement

    return install


def _torn_text(*endings: str) -> Aim:
    """Leaves half of a text file."""

    def install(nth: int) -> None:
        original, countdown = Path.write_text, _Countdown(nth)

        def replacement(path: Path, text: str, *args: Any, **named: Any) -> int:
            if path.name.endswith(endings) and countdown.is_over():
                original(path, text[: len(text) // 2], *args, **named)
                die()
            return original(path, text, *args, **named)

        Path.write_text = replacement  # type: ignore[method-assign]

    return install


def _torn_record(nth: int) -> None:
    original, countdown = loggers.JsonLinesLogger.log, _Countdown(nth)

    def replacement(logger: Any, step: int, scalars: Any) -> None:
        if countdown.is_over():
            with logger._path.open("a") as file:
                file.write('{"step": 1')
            die()
        original(logger, step, scalars)

    loggers.JsonLinesLogger.log = replacement  # type: ignore[method-assign]


def _beside(nth: int) -> None:
    """Dies on the training thread while the other one writes."""
    save, log, countdown, writing = tensor_files.save_file, loggers.JsonLinesLogger.log, _Countdown(nth), Event()

    def slow(*args: Any, **named: Any) -> None:
        if countdown.is_over():
            writing.set()
            Event().wait()
        save(*args, **named)

    def watching(*args: Any) -> None:
        log(*args)
        if writing.is_set():
            die()

    tensor_files.save_file = slow
    loggers.JsonLinesLogger.log = watching  # type: ignore[method-assign]


def _torn_study(nth: int) -> None:
    """Leaves half of a line in the journal of a study, and its lock."""
    original, countdown = JournalFileBackend.append_logs, _Countdown(8 + nth)

    def replacement(journal: Any, logs: Any) -> None:
        if countdown.is_over():
            journal._lock.acquire()
            with Path(journal._file_path).open("a") as file:
                file.write('{"op_code":4,"worker')
            die()
        original(journal, logs)

    JournalFileBackend.append_logs = replacement  # type: ignore[method-assign]


def _renamed(ending: str, *, before: bool) -> Aim:
    return lambda nth: _around(Path, "replace", nth, lambda path: path.name.endswith(ending), before=before)


def _unlinked(nth: int) -> None:
    _around(Path, "unlink", nth, lambda path: path.name.startswith("step_"), before=True)


_CHECKPOINT = ".safetensors.partial"

half_a_checkpoint = _torn_tensors("step_")

AIMED: dict[str, tuple[Aim, ...]] = {
    "half a checkpoint": (half_a_checkpoint,),
    "half of the temporary file of safetensors": (_torn_tensors("step_", temporary=True),),
    "checkpoint before its rename": (_renamed(_CHECKPOINT, before=True),),
    "checkpoint after its rename": (_renamed(_CHECKPOINT, before=False),),
    "old checkpoint before its removal": (_unlinked,),
    "training while a checkpoint is written": (_beside,),
    "half a record": (_torn_record,),
    "half of the records rewritten by a resumed run": (_torn_record, _torn_text("metrics.jsonl.partial")),
    "those before their rename": (_torn_record, _renamed("metrics.jsonl.partial", before=True)),
    "half of the outer variables at the end": (_torn_tensors("hparams"),),
    "half of their temporary file": (_torn_tensors("hparams", temporary=True),),
    "half of the name of the writer": (_torn_text(".writer.json", ".writer.json.partial"),),
}
"""What a killed process leaves, with an aim for each start of it in a row."""
ONCE = ("records rewritten", "before their rename", "outer variables", "temporary file", "name of the writer")
"""Parts of the names of those that a start comes by once only."""

AIMED_AT_TRAINING: dict[str, tuple[Aim, ...]] = {
    "half of config.yaml": (_torn_text("config.yaml", "config.yaml.partial"),),
    "half of results.json": (_torn_text("results.json.partial"),),
    "half a checkpoint": (half_a_checkpoint,),
    "half of the outer variables at the end": (_torn_tensors("hparams"),),
    "half a record, then half of the records rewritten": (_torn_record, _torn_text("metrics.jsonl.partial")),
}
AIMED_AT_A_SEARCH: dict[str, tuple[Aim, ...]] = {
    "half of config.yaml": (_torn_text("config.yaml", "config.yaml.partial"),),
    "half a checkpoint": (half_a_checkpoint,),
    "half a line of the study": (_torn_study,),
}


def start(go_on: Callable[[Path], None], folder: Path, log: Path, aim: Callable[[], None] | None = None) -> int:
    """Returns the number of a child process that goes on with a run; it has imported everything already."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # Whoever started the harness may ignore an interrupt, as a shell does for what goes on in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # A power failure is not tried, and waiting for a busy disk takes most of the time.
        os.fsync = lambda descriptor: None
        if aim is not None:
            aim()
        go_on(folder)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 (the child must not go on with what its parent was about)
        with log.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Waits for a child; returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_ended(child: int) -> bool:
    """Returns whether a child has ended; it stays there until it is waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def signal_after(child: int, seconds: float, number: int, again_after: float | None) -> int:
    """Waits, sends a signal (twice, if so told) and returns the exit code."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not has_ended(child):
        time.sleep(min(0.002, max(0.0, until - time.monotonic())))
    os.kill(child, number)
    if again_after is not None:
        time.sleep(again_after)
        os.kill(child, number)  # an ended child is there until it is waited for
    return exit_code(child)


KINDS: dict[str, tuple[int, bool]] = {
    "SIGKILL": (signal.SIGKILL, False),
    "SIGTERM": (signal.SIGTERM, False),
    "SIGINT": (signal.SIGINT, False),
    "SIGINT twice": (signal.SIGINT, True),
}


def pause_before_the_second(kind: str, generator: random.Random) -> float | None:
    """Returns the seconds between two signals; None for a single one."""
    return generator.uniform(0.0, 0.02) if KINDS[kind][1] else None
