"""Runs tests in a forked process: torch is imported once, the library and the tests in each child anew."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any

import coverage
import pytest

_fork = multiprocessing.get_context("fork")

# What the tests import besides the library; without it each child would.
_WARM = (
    *("torch", "torch.func", "torch._dynamo", "torch._inductor.compile_fx", "torch.utils.tensorboard", "numpy"),
    *("PIL.Image", "matplotlib.pyplot", "matplotlib.figure", "hydra", "omegaconf", "rich.progress"),
    *("safetensors.torch", "sklearn.linear_model", "pooch", "higher"),
)
_MEMORY = 12 * 2**30  # bytes of data, beyond which an error is noticed
_LOADING = 120.0  # seconds that importing the library and the tests may take


@dataclass
class Outcome:
    """What running tests came to.

    Attributes:
        seconds: CPU seconds of each test that passed, with those of the processes that it started.
        failed: the first test that failed; None if none did.
        why: how it failed: "failed", "endless", "crashed"; empty if none did.
        wall: seconds that all took.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    failed: str | None = None
    why: str = ""
    wall: float = 0.0


def warm_up() -> None:
    """Imports what the children share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _WARM:
            importlib.import_module(name)
    assert "hypertorch" not in sys.modules


class Child:
    """A process that runs tests in a copy of the checkout, with limits.

    Args:
        copy: the copy.
        batches: names of tests or files, run batch by batch until one fails.
        expected: CPU seconds of each test; the limit of a test is ten times that and twenty seconds more.
        log: what the tests print goes there.
        data: file for which test reaches which line of the library; None to go without.
        first_only: whether the first failure ends the run.
    """

    def __init__(
        self,
        copy: Path,
        batches: Sequence[Sequence[str]],
        *,
        expected: dict[str, float],
        log: Path,
        data: Path | None = None,
        first_only: bool = True,
    ) -> None:
        self.connection, end = _fork.Pipe(duplex=False)
        self.outcome = Outcome()
        self._expected = expected
        self._running = ""
        self._started = monotonic()
        self._deadline = self._started + 3 * _LOADING
        settings = {"expected": expected, "log": log, "data": data, "first_only": first_only}
        self._process: BaseProcess = _fork.Process(target=_run, args=(end, copy, batches), kwargs=settings)
        self._process.start()
        end.close()

    @property
    def remaining(self) -> float:
        """Seconds until it is stopped."""
        return self._deadline - monotonic()

    def read(self) -> bool:
        """Takes in what the child says, and returns whether it has ended."""
        while self.connection.poll():
            try:
                kind, name, seconds = self.connection.recv()
            except EOFError:
                return self._end("crashed")
            if kind == "starts":
                self._running = name
                # The clock of the CPU in the child is what counts; this one is for tests that wait for ever.
                self._deadline = monotonic() + 4 * _limit(self._expected, name) + 60
            elif kind == "passed":
                self.outcome.seconds[name], self._running = seconds, ""
            elif kind == "failed":
                self.outcome.failed, self.outcome.why = self.outcome.failed or name, self.outcome.why or "failed"
            elif kind == "done":
                return self._end("")
        if self.remaining < 0:
            return self._end("endless")
        return False

    def stop(self) -> None:
        """Ends the process and those that it started."""
        try:
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.join()
        self.connection.close()

    def _end(self, why: str) -> bool:
        if why == "crashed":
            self._process.join()
            if self._process.exitcode == -signal.SIGPROF:
                why = "endless"
        self.stop()
        if why and not self.outcome.failed:
            self.outcome.failed, self.outcome.why = self._running or "(importing)", why
        self.outcome.wall = monotonic() - self._started
        return True


def run_all(children: Iterator[tuple[Any, Child]], processes: int) -> Iterator[tuple[Any, Outcome]]:
    """Runs children, some at a time, and yields what each came to, with what it was called, as they end."""
    running: dict[Connection, tuple[Any, Child]] = {}
    try:
        while True:
            while len(running) < processes and (started := next(children, None)) is not None:
                running[started[1].connection] = started
            if not running:
                return
            patience = min(child.remaining for _, child in running.values())
            multiprocessing.connection.wait(list(running), timeout=max(patience, 0.1))
            for connection, (name, child) in list(running.items()):
                if child.read():
                    del running[connection]
                    yield name, child.outcome
    finally:
        for _, child in running.values():
            child.stop()


def _limit(expected: dict[str, float], name: str) -> float:
    return 20 + 10 * expected.get(name, 30.0)


def _run(
    connection: Connection,
    copy: Path,
    batches: Sequence[Sequence[str]],
    *,
    expected: dict[str, float],
    log: Path,
    data: Path | None,
    first_only: bool,
) -> None:
    """What the child does."""
    os.setpgrp()
    for handled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in ("", os.environ["MUTATED_CHECKOUT"]))]
    signal.setitimer(signal.ITIMER_PROF, _LOADING)
    measured = None
    if data is not None:
        measured = coverage.Coverage(
            data_file=str(data), source=[str(copy / "hypertorch")], config_file=False, data_suffix=False
        )
        measured.set_option("run:relative_files", True)
        measured.start()
    plugin = _Plugin(connection, expected, measured)
    for batch in batches:
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *(["-x"] if first_only else [])]
        # Plugins that the parent or the batch before has imported are none the worse for it.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        plugin.wanted = {name: place for place, name in enumerate(batch)}
        # By file: a name of a test may hold characters that a command line reads as something else.
        files = dict.fromkeys(name.partition("::")[0] for name in batch)
        status = pytest.main([*options, *files], plugins=[plugin])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            plugin.say("failed", plugin.failed or "(importing)")
            if first_only:
                break
    if measured is not None:
        measured.stop()
        measured.save()
    plugin.say("done", "")
    connection.close()
    sys.stdout.flush()
    os._exit(0)


class _Plugin:
    """Says which test runs, and ends the process when one takes far longer than it did."""

    def __init__(self, connection: Connection, expected: dict[str, float], measured: coverage.Coverage | None) -> None:
        self._connection, self._expected, self._measured = connection, expected, measured
        self._has_failed = False
        self.wanted: dict[str, int] = {}
        self.failed = ""

    def say(self, kind: str, name: str, seconds: float = 0.0) -> None:
        """Sends one message."""
        self._connection.send((kind, name, seconds))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leaves the tests that are wanted, by name or as part of a file, in the order in which they are."""
        places = {item.nodeid: self.wanted.get(item.nodeid, self.wanted.get(_file_of(item))) for item in items}
        items[:] = [item for item in items if places[item.nodeid] is not None]
        items.sort(key=lambda item: places[item.nodeid] or 0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Times a test."""
        name = item.nodeid
        self._has_failed = False
        self.say("starts", name)
        if self._measured is not None:
            self._measured.switch_context(name)
        # The signal's own action ends the process, also inside of compiled code.
        signal.setitimer(signal.ITIMER_PROF, _limit(self._expected, name))
        before = sum(os.times()[:4])
        result = yield
        if self._has_failed:
            self.failed = self.failed or name
            self.say("failed", name)
        else:
            self.say("passed", name, sum(os.times()[:4]) - before)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes a failure."""
        self._has_failed = self._has_failed or report.failed


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]
