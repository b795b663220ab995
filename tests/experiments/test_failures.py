"""A command whose reader has enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("word", ["--help", "only=[]"])
def test_a_closed_pipe_ends_a_command_without_a_word(word: str, tmp_path: Path) -> None:
    """Its own words go to the closed pipe too, as with `2>&1 | head`, if it has any."""
    errors = subprocess.PIPE if word == "--help" else subprocess.STDOUT
    words = [sys.executable, "benchmarks/compare_libraries.py", word, f"paths.run_dir={tmp_path}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT) as command:
        assert command.stdout is not None
        command.stdout.close()
        written = "" if command.stderr is None else command.stderr.read()
        assert (command.wait(), written) == (1, "")
