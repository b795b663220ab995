"""Checkpoints are written beside the training: each as the run was then, one at a time, none lost."""

from __future__ import annotations

import contextlib
import errno
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import hypertorch as ht
from hypertorch.errors import CheckpointError, NonFiniteError
from hypertorch.outer.storage import checkpoints as checkpoints_module
from hypertorch.outer.storage import tensor_files
from hypertorch.outer.storage.background import BackgroundWriter, background_writer
from hypertorch.outer.storage.one_writer import one_writer
from tests.outer.problems import Quadratics
from tests.outer.runs import assert_same_checkpoint, full_loop, records

PATIENCE = 60.0  # seconds, on a busy machine


class Steps(Quadratics):
    """Tells which outer steps have begun."""

    begun: Mapping[int, threading.Event]

    def at(self, outer_step: int) -> ht.BilevelProblem:
        self.begun[outer_step].set()
        return super().at(outer_step)


def watched(**options: Any) -> Steps:
    source = Steps(**options)
    object.__setattr__(source, "begun", {step: threading.Event() for step in range(100)})
    return source


def replace_write(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    """Calls a function with the name of each checkpoint before it is written."""
    write = checkpoints_module.write_tensor_file

    def replacement(path: Path, *args: Any) -> None:
        before(path.name)
        write(path, *args)

    monkeypatch.setattr(checkpoints_module, "write_tensor_file", replacement)


def test_training_goes_on_until_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, busy, prepare = watched(), threading.Lock(), ht.Checkpoints.prepare
    went_on: list[bool] = []

    def slow(name: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert busy.acquire(blocking=False)
        if name == "step_00000005.safetensors":
            went_on.append(source.begun[9].wait(PATIENCE))
            went_on.append(source.begun[10].wait(0.3))
        busy.release()

    def prepare_alone(*args: Any) -> Any:
        assert not busy.locked()  # there would be two copies of the state
        return prepare(*args)

    replace_write(monkeypatch, slow)
    monkeypatch.setattr(ht.Checkpoints, "prepare", prepare_alone)
    full_loop(tmp_path, source).run(12)
    assert went_on == [True, False]


@pytest.mark.parametrize("released_by", [6, 9])
def test_a_late_checkpoint_holds_the_state_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released_by: int
) -> None:
    def folder(name: str) -> dict[str, Any]:
        return {"checkpoints": ht.Checkpoints(tmp_path / name, every=5, keep=9)}

    full_loop(tmp_path, **folder("straight")).run(10)
    (tmp_path / "metrics.jsonl").unlink()
    source = watched()
    replace_write(monkeypatch, lambda name: source.begun[released_by].wait(PATIENCE) and None)
    full_loop(tmp_path, source, **folder("late")).run(10)
    for step in (5, 10):
        name = f"step_{step:08d}.safetensors"
        left, right = (ht.Checkpoints(tmp_path / kind).load(tmp_path / kind / name) for kind in ("straight", "late"))
        # The class of the source is one of the settings.
        left.settings.clear()
        right.settings.clear()
        for kind, checkpoint in (("straight", left), ("late", right)):
            ht.Checkpoints(tmp_path / f"bare_{kind}").save(checkpoint)
        assert_same_checkpoint(tmp_path / "bare_straight" / name, tmp_path / "bare_late" / name)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_write_is_raised_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, failed = watched(), threading.Event()

    def fail(*_: object, **__: object) -> None:
        failed.set()
        full_disk()

    class Waiting(ht.MemoryLogger):
        def log(self, step: int, scalars: Mapping[str, float]) -> None:
            assert step < 42 or failed.wait(PATIENCE)

    monkeypatch.setattr(tensor_files, "save_file", fail)
    loop = full_loop(tmp_path, source, loggers=[Waiting()], checkpoints=ht.Checkpoints(tmp_path, every=40))
    with pytest.raises(CheckpointError, match=r"step_00000040.safetensors` could not be written .*the disk is full"):
        loop.run(80)
    assert not source.begun[79].is_set()


@pytest.mark.parametrize("steps", [3, 5, 10])
def test_a_failed_last_write_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setattr(tensor_files, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="could not be written"):
        full_loop(tmp_path).run(steps)
    assert not (tmp_path / "checkpoints" / "hparams.safetensors").exists()


@pytest.mark.parametrize("failure", [RuntimeError("the power went out"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failed_write_is_raised_beside_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    source = watched(fail_at=5, failure=failure)

    def late(*_: object, **__: object) -> None:
        # Known only when the step has failed: known before, it would be raised before the step.
        assert source.begun[5].wait(PATIENCE)
        full_disk()

    monkeypatch.setattr(tensor_files, "save_file", late)
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        full_loop(tmp_path, source).run(40)
    assert caught.value.__context__ is failure


@pytest.mark.parametrize("failure", [RuntimeError("the power went out"), KeyboardInterrupt(), SystemExit(3)])
def test_a_run_that_ends_waits_for_its_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    refused: list[bool] = []
    released = threading.Event()

    def slow(name: str) -> None:
        released.wait(0.2)
        with (
            pytest.raises(CheckpointError, match="is being written by process"),
            one_writer(tmp_path / "checkpoints"),
        ):
            pass
        refused.append(True)

    replace_write(monkeypatch, slow)
    with pytest.raises(type(failure)):
        full_loop(tmp_path, Quadratics(fail_at=7, failure=failure)).run(40)
    expected = [5] if isinstance(failure, RuntimeError) else [5, 7]
    names = [path.name for path in ht.Checkpoints(tmp_path / "checkpoints").paths()]
    assert names == [f"step_{step:08d}.safetensors" for step in expected]
    assert refused == [True] * len(expected)
    # Every record that a checkpoint counts is there before it.
    assert records(tmp_path / "metrics.jsonl")[-1]["step"] == 6


def test_one_write_after_the_other() -> None:
    written: list[int] = []
    with background_writer() as writer:
        writer.wait()  # for nothing
        writer.begin(lambda: written.append(1))
        writer.begin(lambda: written.append(2))
        assert written[0] == 1
    assert written == [1, 2]


def test_a_write_outlives_an_interrupt_of_waiting_for_it() -> None:
    begun, released, main = threading.Event(), threading.Event(), threading.main_thread().ident
    written: list[bool] = []
    interrupts: list[int] = []

    def once(number: int, frame: object) -> None:
        interrupts.append(number)
        if len(interrupts) == 1:
            raise KeyboardInterrupt

    def interrupt() -> None:
        assert begun.wait(PATIENCE)
        assert main is not None
        give_up = time.monotonic() + PATIENCE
        # Python misses a signal that comes just before it waits for a lock, so one may not be enough.
        while not released.wait(0.1) and time.monotonic() < give_up:
            signal.pthread_kill(main, signal.SIGINT)
        written.append(released.is_set())
        full_disk()

    def wait(writer: BackgroundWriter) -> None:
        begun.set()
        writer.wait()

    before = signal.signal(signal.SIGINT, once)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(pytest.raises(OSError, match="No space"))
            writer = stack.enter_context(background_writer())
            writer.begin(interrupt)
            with pytest.raises(KeyboardInterrupt):
                wait(writer)
            assert not written
            released.set()
    finally:
        signal.signal(signal.SIGINT, before)
    assert written == [True]


class Overflowing(torch.optim.SGD):
    """Leaves infinity after the sixth step."""

    count = 0

    def step(self, closure: None = None) -> None:
        self.count += 1
        if self.count == 6:
            for group in self.param_groups:
                for leaf in group["params"]:
                    leaf.detach().fill_(float("inf"))


def test_the_last_checkpoint_is_named_where_it_is_still_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = watched()
    # Long enough for the step that diverges.
    replace_write(monkeypatch, lambda name: source.begun[6].wait(0.5) and None)
    diverging = {"optimizer": partial(Overflowing, lr=1.0)}
    with pytest.raises(NonFiniteError, match=r"The last checkpoint, `.*step_00000005.safetensors`, holds none"):
        full_loop(tmp_path, source, clip_norm=None, scheduler=None, constraints=None, **diverging).run(6)
