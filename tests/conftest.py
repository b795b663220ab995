"""What holds for every test: seeded, deterministic, few threads, and on a GPU only where there is one."""

from __future__ import annotations

import gc
import signal

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that forgets to seed is repeatable all the same."""
    torch.manual_seed(0)
