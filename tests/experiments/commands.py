"""Runs a command in the test's process, as it would be typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments import train

TINY = ("debug=fewshot", "outer_loop.progress=false", "backbone.hidden=4")
SINUSOID = ("experiment=sinusoid", "debug=fewshot", "outer_loop.progress=false")

Command = Callable[..., tuple[int, str]]


def results_of(command: Command, folder: Path, *words: str) -> dict[str, Any]:
    """Returns the results of a run in a folder, which must end well."""
    code, error = command(*words, "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Returns what runs a command; it returns the exit code and what was written to stderr."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: str, module: ModuleType = train) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"{module.__name__.rpartition('.')[2]}.py", *arguments])
        capsys.readouterr()
        code = module.failures.exit_code(module.main)
        GlobalHydra.instance().clear()
        return code, capsys.readouterr().err

    return run
