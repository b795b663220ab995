"""The training command under `torchrun`: the run of one process, lost processes, restarts, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hypertorch as ht
from experiments import evaluate, train
from tests.experiments.commands import TINY, Command, runner
from tests.outer.runs import records

ROOT = Path(__file__).resolve().parents[2]
_LONGEST = 600  # seconds; a busy machine is several times slower
STEPS = 60
RUN = (
    *TINY, "execution.tasks=loop", "dtype=float64", f"outer_loop.num_outer_steps={STEPS}", "outer_loop.log_every=1",
    "outer_loop.checkpoints.every=10", "validation.every=20", "episodes.num_tasks=4",
)  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


def started(*words: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Starts two processes by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "experiments/train.py"), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(launcher: subprocess.Popen[str]) -> str:
    """What the processes said, once they have ended; ends them if they do not."""
    try:
        return launcher.communicate(timeout=_LONGEST)[0]
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.communicate()


def workers(launcher: subprocess.Popen[str]) -> dict[str, int]:
    """The processes of the run, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        variables = dict(
            entry.split("=", 1) for entry in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in entry
        )
        if "RANK" in variables:
            found[variables["RANK"]] = int(child)
    return found


def kill_a_process(launcher: subprocess.Popen[str], rank: str, metrics: Path, num_records: int) -> list[int]:
    """Kills one of the processes after some records, and returns the ids of all."""
    deadline = time.monotonic() + _LONGEST
    while not metrics.exists() or metrics.read_text().count("\n") < num_records:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    processes = workers(launcher)
    os.kill(processes[rank], signal.SIGKILL)
    return list(processes.values())


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_same_as_one(folder: Path, alone: Path) -> None:
    found, expected = (load_file(path / "checkpoints/hparams.safetensors") for path in (folder, alone))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert records(folder / "metrics.jsonl") == records(alone / "metrics.jsonl")
    figures = [json.loads((path / "results.json").read_text())["metrics"] for path in (folder, alone)]
    assert figures[0] == figures[1]


@pytest.fixture
def alone(command: Command, tmp_path: Path) -> Path:
    """The folder of a run of one process."""
    assert command(*RUN, f"paths.run_dir={tmp_path / 'alone'}") == (0, command_said(tmp_path))
    return tmp_path / "alone"


def command_said(folder: Path) -> str:
    return f"run in {folder / 'alone'}\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_ends_all_and_the_run_goes_on_to_the_same_bits(
    rank: str, alone: Path, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    launcher = started(*RUN, f"paths.run_dir={folder}")
    try:
        processes = kill_a_process(launcher, rank, folder / "metrics.jsonl", 25)
        killed = time.monotonic()
    except BaseException:
        os.killpg(launcher.pid, signal.SIGKILL)
        raise
    said = ended(launcher)
    assert time.monotonic() - killed < 30, said
    assert launcher.returncode == 1
    assert not any(is_alive(process) for process in processes)
    checkpoints = ht.Checkpoints(folder / "checkpoints")
    newest = checkpoints.newest()
    assert newest is not None and checkpoints.load(newest).step >= 20
    # On two processes again, and the last part on one.
    again = started(*RUN, f"paths.run_dir={folder}", "resume=true")
    said = ended(again)
    assert again.returncode == 0, said
    assert_same_as_one(folder, alone)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_an_elastic_restart_goes_on_with_the_run(alone: Path, tmp_path: Path) -> None:
    # Without a name: the processes that are started again find their run.
    launcher = started(*RUN, f"paths.log_dir={tmp_path / 'logs'}", restarts=1)
    runs = tmp_path / "logs/train/runs"
    deadline = time.monotonic() + _LONGEST
    try:
        while not (found := list(runs.glob("*/metrics.jsonl"))):
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        kill_a_process(launcher, "1", found[0], 25)
    except BaseException:
        os.killpg(launcher.pid, signal.SIGKILL)
        raise
    said = ended(launcher)
    assert launcher.returncode == 0, said
    assert f"resuming in {found[0].parent}" in said
    assert list(runs.iterdir()) == [found[0].parent]
    assert_same_as_one(found[0].parent, alone)


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (train, ("--multirun", "seed=0,1"), "`WORLD_SIZE` is 2, but a multirun starts its runs itself"),
        (train, ("-m", "seed=0,1"), "`WORLD_SIZE` is 2, but a multirun starts its runs itself"),
        (train, ("hydra.mode=MULTIRUN", "seed=0,1"), "`WORLD_SIZE` is 2, but a multirun starts its runs itself"),
        (train, ("--multi", "seed=0,1"), "`WORLD_SIZE` is 2, but a multirun starts its runs itself"),
        (train, ("hydra.mode='MULTIRUN'", "seed=0,1"), "`WORLD_SIZE` is 2, but a multirun starts its runs itself"),
        (train, ("++hydra.mode=2", "seed=0,1"), "`WORLD_SIZE` is 2, but a multirun starts its runs itself"),
        (evaluate, ("run=x",), "`WORLD_SIZE` is 2, but this command runs on one process"),
        (train, (), "`WORLD_SIZE` is '2' in the environment, but"),
    ],
)
def test_what_several_processes_cannot_run_is_refused(
    module: Any, words: tuple[str, ...], message: str, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    code, said = command(*words, f"paths.log_dir={tmp_path}", module=module)
    assert code == 1
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("config.yaml"))
