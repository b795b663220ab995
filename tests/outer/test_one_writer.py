"""A folder has one writer, however the last one ended; what stands in the way of writing is said as it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import hypertorch as ht
from hypertorch.errors import CheckpointError
from hypertorch.outer.storage import tensor_files
from hypertorch.outer.storage.checkpoints import Checkpoints
from hypertorch.outer.storage.one_writer import is_shared_with_machines, one_writer
from tests.outer.problems import Quadratics
from tests.outer.runs import full_loop, records

HOLD = """
import sys, time
from pathlib import Path
from hypertorch.outer.storage.one_writer import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_living_writer_is_named_and_a_dead_one_replaced(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    process = holder(folder)
    try:
        before = sorted(folder.iterdir())
        named = rf"is being written by process {process.pid} on '{socket.gethostname()}' since 20"
        with pytest.raises(CheckpointError, match=named):
            full_loop(tmp_path).run(5)
        assert sorted(folder.iterdir()) == before
        assert not (tmp_path / "metrics.jsonl").exists()
    finally:
        end(process, number)
    assert full_loop(tmp_path).run(5).num_outer_steps == 5
    assert json.loads((folder / ".writer.json").read_text())["pid"] == os.getpid()


def test_two_runs_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    class Nested(ht.Logger):
        def log(self, step: int, scalars: Mapping[str, float]) -> None:
            with pytest.raises(CheckpointError, match=f"is being written by process {os.getpid()} on"):
                full_loop(tmp_path).run(2, resume=True)

        def rewind(self, step: int) -> None:
            pass

        def close(self) -> None:
            pass

    full_loop(tmp_path, loggers=[Nested()]).run(2)
    # It is free again, also after an error.
    with pytest.raises(RuntimeError, match="the power went out"):
        full_loop(tmp_path, Quadratics(fail_at=3)).run(4, resume=True)
    assert full_loop(tmp_path).run(4, resume=True).num_outer_steps == 4


@pytest.mark.parametrize("text", ["", "[]", "nothing", '{"pid": "many"}'])
def test_a_writer_that_is_not_known_yet_is_another_process(text: str, tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        (tmp_path / ".writer.json").write_text(text)
        with (
            pytest.raises(CheckpointError, match="is being written by another process: two"),
            one_writer(tmp_path),
        ):
            pass
    finally:
        end(process, signal.SIGKILL)


def left_behind(folder: Path, **changes: object) -> Path:
    """What a writer of another machine leaves that was killed."""
    owner = folder / ".writer.json"
    owner.write_text(json.dumps({"pid": 71, "host": "node7", "since": "2026-01-31T12:00:00", **changes}))
    return owner


def test_a_writer_of_another_machine_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypertorch.outer.storage.one_writer.is_shared_with_machines", lambda folder: True)
    owner = left_behind(tmp_path)
    refusal = (
        r"last written by process 71 on 'node7' since 2026-01-31T12:00:00, which did not say that it ended.*delete"
    )
    with pytest.raises(CheckpointError, match=refusal), one_writer(tmp_path):
        pass
    assert json.loads(owner.read_text())["pid"] == 71  # which is still said to the next
    owner.unlink()
    with one_writer(tmp_path):
        pass
    assert json.loads(owner.read_text())["ended"] is True
    for changes in ({"ended": True}, {"host": socket.gethostname()}):
        left_behind(tmp_path, **changes)
        with one_writer(tmp_path):
            pass


def test_on_a_file_system_of_this_machine_the_lock_alone_decides(tmp_path: Path) -> None:
    left_behind(tmp_path)
    with one_writer(tmp_path):
        pass


@pytest.mark.parametrize(
    ("mounts", "shared"),
    [
        ("22 1 8:1 / / rw - ext4 /dev/sda1 rw", False),
        ("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 0:40 / {folder} rw - nfs4 server:/home rw", True),
        ("22 1 0:40 / / rw - nfs server:/root rw\n30 22 8:1 / {parent} rw - xfs /dev/sda1 rw", False),
        ("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 0:41 / {parent} rw - lustre mds:/scratch rw,flock", True),
        ("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 0:41 / /elsewhere rw - nfs server:/other rw", False),
    ],
)
def test_a_shared_file_system_is_known_by_the_mounts(
    mounts: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run of today"
    folder.mkdir()
    places = {"folder": str(folder).replace(" ", "\\040"), "parent": str(tmp_path)}
    original = Path.read_text

    def read(path: Path, **named: object) -> str:
        is_list = str(path) == "/proc/self/mountinfo"
        return mounts.format(**places) if is_list else original(path, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", read)
    assert is_shared_with_machines(folder) is shared


LATE = """
import json, os, socket, sys, time
from pathlib import Path
from filelock import FileLock
folder = Path(sys.argv[1])
with FileLock(folder / ".lock"):
    print("held", flush=True)
    input()
    time.sleep(0.1)
    name = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2026"}
    (folder / ".writer.json").write_text(json.dumps(name))
    input()
"""


def test_the_name_that_a_killed_process_left_is_not_taken_for_the_writer(tmp_path: Path) -> None:
    dead = holder(tmp_path)
    end(dead, signal.SIGKILL)
    assert json.loads((tmp_path / ".writer.json").read_text())["pid"] == dead.pid
    with subprocess.Popen(
        [sys.executable, "-c", LATE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as late:
        assert late.stdin is not None
        assert late.stdout is not None
        assert late.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="is being written by another process: two"), one_writer(tmp_path):
            pass
        late.stdin.write("\n")
        late.stdin.flush()
        with (
            pytest.raises(CheckpointError, match=f"is being written by (process {late.pid} on|another process)"),
            one_writer(tmp_path),
        ):
            pass
        late.stdin.write("\n")


def test_leftovers_of_interrupted_writes_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (".tmpXy12ab", "step_00000003.safetensors.partial", "hparams.safetensors.partial"):
        (folder / name).write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    full_loop(tmp_path).run(5)
    assert {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} == {
        ".lock",
        ".writer.json",
        "notes.txt",
    }
    # Also of a run that is done, which writes no checkpoint.
    (folder / ".tmpXy12ab").write_bytes(b"half")
    full_loop(tmp_path).run(5, resume=True)
    assert not (folder / ".tmpXy12ab").exists()


def test_a_deleted_folder_is_an_error_at_the_next_record(tmp_path: Path) -> None:
    class Deleting(Quadratics):
        def at(self, outer_step: int) -> ht.BilevelProblem:
            if outer_step == 4:
                shutil.rmtree(tmp_path)
            return super().at(outer_step)

    with pytest.raises(CheckpointError, match=r"metrics\.jsonl` was deleted or replaced while the run wrote to it"):
        full_loop(tmp_path, Deleting(), log_every=1).run(20)


def test_a_replaced_file_of_records_is_an_error(tmp_path: Path) -> None:
    logger = ht.JsonLinesLogger(tmp_path / "metrics.jsonl")
    logger.log(1, {"loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="was deleted or replaced"):
        logger.log(2, {"loss": 1.0})
    logger.close()
    logger.log(3, {"loss": 1.0})
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [3]
    logger.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full.*Make room"),
        (OSError(errno.EACCES, "Permission denied"), "this user may not write there.*Get write access"),
        (OSError(errno.EROFS, "Read-only file system"), "this user may not write there"),
        (OSError(errno.ENOENT, "No such file or directory"), "the folder is gone.*Put it back"),
        (OSError(errno.EIO, "Input/output error"), "the system refused it.*Mend that"),
    ],
)
def test_only_a_full_disk_is_called_full(
    error: OSError, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(tensor_files, "save_file", refuse)
    with pytest.raises(CheckpointError, match=rf"could not be written \(.*\): {words}") as caught:
        full_loop(tmp_path).run(5)
    assert ("disk is full" in str(caught.value)) == (error.errno == errno.ENOSPC)


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    loop = full_loop(tmp_path, Quadratics(fail_at=1), checkpoints=Checkpoints(tmp_path / "file" / "checkpoints"))
    with pytest.raises(CheckpointError, match="could not be written"):
        loop.run(5)
