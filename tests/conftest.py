"""What holds for every test: seeded, deterministic, few threads, and on a GPU only where there is one."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # One thread per process when processes share the cores; results do not depend on it within a test's tolerance.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    torch.use_deterministic_algorithms(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that forgets to seed is repeatable all the same."""
    torch.manual_seed(0)
