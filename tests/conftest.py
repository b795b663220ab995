"""What holds for every test: seeded, deterministic, few threads, and on a GPU only where there is one."""

from __future__ import annotations

import gc
import signal
import zlib

import pytest
import torch


def pytest_configure() -> None:
    # Threads that wait for each other on busy cores make small operations a hundred times slower.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # A shell that starts the tests in the background lets them, and every process they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    # What is there before the first test stays: every later look for garbage passes it over.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _leave_cases_to_the_slow_tests(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def _leave_cases_to_the_slow_tests(items: list[pytest.Item]) -> None:
    """Marks most cases of large families slow: the first stays, and of the others one of the number in the mark.

    By the hash of their names, so that every part of a name has its turn, and a new case moves no other.
    """
    begun: set[str] = set()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None and mark.kwargs.get("among", "") in item.name:
            test = item.nodeid.partition("[")[0]
            if test in begun and zlib.crc32(item.name.encode()) % mark.args[0]:
                item.add_marker("slow")
            begun.add(test)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that forgets to seed is repeatable all the same."""
    torch.manual_seed(0)
