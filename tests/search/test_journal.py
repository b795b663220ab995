"""The file of a study after its end was torn, and with what is no study."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from hydra_plugins.hypertorch_search._study import open_storage

optuna.logging.set_verbosity(optuna.logging.ERROR)


def written(folder: Path) -> tuple[Path, list[bytes]]:
    """A study of two trials in a file, and its lines."""
    study = optuna.create_study(storage=open_storage(None, folder), study_name="search")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    path = folder / "study.journal"
    return path, path.read_bytes().splitlines(keepends=True)


def goes_on(folder: Path) -> list[float]:
    """The values of the finished trials, after one more was written and the file read anew."""
    study = optuna.load_study(storage=open_storage(None, folder), study_name="search")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    again = optuna.load_study(storage=open_storage(None, folder), study_name="search")
    return [trial.value for trial in again.trials if trial.value is not None]


@pytest.mark.parametrize("end", [b'{"op_code":6,"tri', b"\xff\x00nonsense", b"nonsense\n", b"\n", b"12\n", b"\0" * 40])
def test_a_torn_end_is_cut(end: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, lines = written(tmp_path)
    path.write_bytes(b"".join(lines) + end)
    open_storage(None, tmp_path)
    assert path.read_bytes() == b"".join(lines)
    assert f"ended in a torn line, which was cut: line {len(lines) + 1}, {len(end)} bytes" in caplog.text
    assert not list(tmp_path.glob("*.lock*"))
    assert len(goes_on(tmp_path)) == 3


def test_every_length_of_the_file_is_opened(tmp_path: Path) -> None:
    path, lines = written(tmp_path)
    whole = b"".join(lines)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        open_storage(None, tmp_path)
        kept = whole[:length]
        assert path.read_bytes() == kept[: kept.rfind(b"\n") + 1]


def test_half_a_file_goes_on(tmp_path: Path) -> None:
    path, lines = written(tmp_path)
    whole = b"".join(lines)
    path.write_bytes(whole[: -len(lines[-1]) - 5])  # the second trial has not ended
    assert len(goes_on(tmp_path)) == 2


def test_a_broken_line_in_the_middle_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    path, lines = written(tmp_path)
    broken = b"".join([*lines[:2], lines[2][:-9] + lines[3], *lines[4:]])
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=rf"^`hydra.sweeper.storage` is the file '{path}', whose line 3 is no record"):
        open_storage(None, tmp_path)
    assert path.read_bytes() == broken
    assert not list(tmp_path.glob("*.lock*"))
    path.write_bytes(b"".join(broken.splitlines(keepends=True)[:2]))  # what the message says to do
    open_storage(None, tmp_path)


def test_a_record_without_what_belongs_to_it_is_refused(tmp_path: Path) -> None:
    path, lines = written(tmp_path)
    path.write_bytes(b"".join([lines[0], lines[1].replace(b"study_id", b"stud_id"), *lines[2:]]))
    with pytest.raises(ValueError, match=r"of which a record cannot be understood \(KeyError\('study_id'\)\)"):
        open_storage(None, tmp_path)


@pytest.mark.parametrize("text", [b"notes", b"notes\n", b"SQLite format 3\0", b'{"loss": 1}\n', b"a\nb\n", b"\0\0"])
def test_a_file_of_something_else_is_left_as_it_is(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="whose line 1 is no record of a study: it may be no study"):
        open_storage(str(path), tmp_path)
    assert path.read_bytes() == text
