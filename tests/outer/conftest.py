"""What holds for the tests of the outer loop."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure cannot be tested, and waiting for a busy disk takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
