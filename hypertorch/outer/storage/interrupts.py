"""Sections of code that a keyboard interrupt must not tear apart."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HELD_BACK = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back interrupt and termination signals until the block has ended, then delivers them.

    Only signals that Python code handles (an interrupt, by raising `KeyboardInterrupt`) are held back, and only in the
    main thread: elsewhere Python delivers none.

    Cost: about a microsecond; the block itself should be short.
    """
    # `signal.signal` raises in any other thread.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def hold_back(number: int, _: FrameType | None) -> None:
        arrived.append(number)

    # What is not callable is the system's own reaction, or a handler that Python does not know and could not put back.
    handlers: dict[signal.Signals, Any] = {
        number: signal.getsignal(number) for number in _HELD_BACK if callable(signal.getsignal(number))
    }
    for number in handlers:
        signal.signal(number, hold_back)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived[:1]:  # one is enough: it ends the run
            signal.raise_signal(number)
