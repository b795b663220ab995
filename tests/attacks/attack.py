"""One malformed input, and the judgement on what came of it."""

from __future__ import annotations

import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiments.common.commands.failures import ExpectedFailure
from hypertorch.errors import HypertorchError

# Far above what a refusal takes, on a machine that is loaded too: what runs into it hangs.
LIMIT = 60.0
TYPED = (HypertorchError, ExpectedFailure, TypeError, ValueError)
CANARY = "canary"


@dataclass(frozen=True)
class Attack:
    """A malformed input.

    Args:
        kind: the table that it belongs to.
        name: which of the table.
        carry_out: hands it in; it gets an empty folder, and calls `CANARY` in it a file that no attack may leave.
        names: what the message has to name, a regular expression.
    """

    kind: str
    name: str
    carry_out: Callable[[Path], object]
    names: str = "`"


@dataclass(frozen=True)
class Verdict:
    """What came of an attack.

    Args:
        fault: what is wrong with it; None for a refusal as it is to be.
        message: the message of the refusal.
        seconds: processor time until then.
    """

    fault: str | None
    message: str
    seconds: float


class Hang(BaseException):
    """Not an `Exception`: nothing that catches these takes it."""


def judge(attack: Attack, folder: Path) -> Verdict:
    """Returns what comes of an attack in an empty folder."""
    start = time.process_time()
    try:
        with _time_limit(), warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = attack.carry_out(folder)
    except TYPED as error:
        message = str(error)
        fault = None if is_own(error) else f"{type(error).__name__} of another library or of Python: {message}"
    except Hang:
        message, fault = "", f"no answer within {LIMIT:g} s"
    except BaseException as error:  # noqa: BLE001 (any other one is the finding)
        message = str(error)
        fault = f"{type(error).__name__}: {message}"
    else:
        message, fault = "", f"taken: {outcome!r:.200}"
    seconds = time.process_time() - start
    if fault is None:
        fault = fault_of_message(message, attack.names)
    if (folder / CANARY).exists():
        fault = "the code of a stranger ran"
    return Verdict(fault=fault, message=message, seconds=seconds)


def is_own(error: BaseException) -> bool:
    """Returns whether an error was raised by a line of this project, and not by what it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = "" if trace is None else trace.tb_frame.f_code.co_filename
    return re.search(r"/(hypertorch|experiments|hydra_plugins|tests)/", file) is not None


def fault_of_message(message: str, names: str) -> str | None:
    """Returns what a message in three parts lacks: what it is about, why it cannot be, what to do."""
    if re.search(names, message) is None:
        return f"the message does not name {names}: {message}"
    # What it is and why are parted by a colon or a comma or are two sentences; what to do is the sentence after them.
    if re.search(r"[,:;(.] .*[^.]\. [A-Z`0-9]", message, flags=re.DOTALL) is None:
        return f"the message is not in three parts: {message}"
    return None


@contextmanager
def _time_limit() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
