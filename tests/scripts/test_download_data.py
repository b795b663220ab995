import subprocess
import sys
from pathlib import Path

from tests.helpers.omniglot import SMALL_BACKGROUND, SMALL_EVALUATION, write_archive

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "download_data"


def run(*arguments):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_what_is_there_is_not_fetched_again(tmp_path):
    paths = [write_archive(tmp_path, part) for part in (SMALL_BACKGROUND, SMALL_EVALUATION)]
    done = run("omniglot", "--root", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(path) for path in paths]


def test_a_folder_that_cannot_be_made_gives_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--root", str(tmp_path / "file"), "--quiet")
    assert done.returncode == 1
    assert done.stderr.startswith("error: `url` ") or "\nerror: `url` " in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_executable():
    assert SCRIPT.stat().st_mode & 0o111
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")
