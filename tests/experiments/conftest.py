"""What the tests of the commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from tests.experiments.commands import SINUSOID, Command, runner


@pytest.fixture(autouse=True)
def _clean_hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process, in an empty folder; returns its exit code and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="session")
def _finished_run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp("finished") / "run"]


@pytest.fixture
def finished(_finished_run: list[Path], command: Command) -> Path:
    """The folder of a short finished run, for reading only: it is made once."""
    (folder,) = _finished_run
    if not folder.exists():
        code, error = command(*SINUSOID, f"paths.run_dir={folder}")
        assert code == 0, error
    return folder
