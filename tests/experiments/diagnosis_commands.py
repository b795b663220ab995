"""Runs the commands that look at hypergradients in this process, on a problem that takes no time."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra.core.global_hydra import GlobalHydra

TINY = ("experiment.num_labellers=2", "experiment.scans_each=4", "experiment.num_validation=8")
PNG = b"\x89PNG\r\n\x1a\n"


class Commands:
    """Runs a command as it would be typed; its folder is `run` in the temporary folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.run_folder = folder / "run"
        monkeypatch.chdir(folder)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def __call__(self, module: ModuleType, *arguments: str) -> tuple[int, str, str]:
        """Returns the exit code, and what was written to stdout and to stderr."""
        GlobalHydra.instance().clear()
        name = module.__name__.rpartition(".")[2]
        self._monkeypatch.setattr(sys, "argv", [f"{name}.py", "paths.run_dir=run", *TINY, *arguments])
        self._capsys.readouterr()
        code = module.failures.exit_code(module.main)
        GlobalHydra.instance().clear()
        written = self._capsys.readouterr()
        return code, written.out, written.err

    def results(self) -> dict:
        return json.loads((self.run_folder / "results.json").read_text(encoding="utf-8"))

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.run_folder / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def is_picture(self, name: str) -> bool:
        return (self.run_folder / name).read_bytes().startswith(PNG)
