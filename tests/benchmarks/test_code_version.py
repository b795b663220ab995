"""Which code was measured: a commit, whether files differ from it, and nothing outside a checkout."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import code_version
from benchmarks.code_version import commit


def git(folder: Path, *words: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *author, *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_a_checkout_has_a_commit_and_perhaps_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    code = tmp_path / "code.py"
    code.write_text("1", encoding="utf-8")
    assert commit(tmp_path) is None
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "v1")
    short = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == short
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "results.json").write_text("{}", encoding="utf-8")
    assert commit(tmp_path) == short
    code.write_text("2", encoding="utf-8")
    assert commit(tmp_path) == f"{short}+"
    # A folder of the checkout is another project's.
    assert commit(tmp_path / "outputs") is None


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    (tmp_path / ".git").mkdir()
    assert commit(tmp_path) is None
    monkeypatch.setattr(code_version.subprocess, "run", absent)
    assert commit(tmp_path) is None
