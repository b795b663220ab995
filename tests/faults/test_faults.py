"""The short form of `python -m tests.faults`; with `-m slow`, the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "words",
    [
        ("--short", "--kills", "3", "--meetings", "1", "--steps", "40"),
        pytest.param(("--kills", "100"), marks=pytest.mark.slow),
    ],
    ids=["short", "long"],
)
def test_runs_come_back_are_kept_apart_and_stay_small(words: tuple[str, ...]) -> None:
    """In a process of its own, which has no thread when it forks."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words, "--no-page"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-3000:]
    assert "FAULT" not in finished.stdout
