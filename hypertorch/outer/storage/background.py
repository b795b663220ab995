"""Writes that go on beside the training, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from hypertorch.outer.storage.interrupts import uninterrupted


class BackgroundWriter:
    """Runs writes in a thread, never two at once."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._pending: Future[object] | None = None

    def begin(self, write: Callable[[], object]) -> None:
        """Begins a write once the last one has ended; raises what that one raised.

        An interrupt must be held back meanwhile: it could lose the thread that it finds half started.
        """
        self.wait()
        self._pending = self._executor.submit(write)

    def check(self) -> None:
        """Raises what the last write raised, if it has ended; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the last write; raises what it raised."""
        if self._pending is None:
            return
        error = self._pending.exception()
        # Only now: an interrupt of the waiting must leave a write that others still wait for.
        self._pending = None
        if error is not None:
            raise error


@contextmanager
def background_writer() -> Iterator[BackgroundWriter]:
    """Gives a writer, and waits for its last write however the block ends; raises what that one raised."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") as executor:
        writer = BackgroundWriter(executor)
        try:
            yield writer
        finally:
            # Whoever catches an interrupt finds the files at rest.
            with uninterrupted():
                writer.wait()
