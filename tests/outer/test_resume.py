"""A run that is stopped at any moment and resumed ends with the same bits as one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import hypertorch as ht
from hypertorch import outer
from hypertorch.errors import CheckpointError
from hypertorch.types import TensorDict
from tests.outer.killed_run import SIGNALS
from tests.outer.problems import Quadratics
from tests.outer.runs import assert_same_checkpoint, assert_same_run, full_loop, make_loop, records

NUM_STEPS = 20
ROOT = Path(__file__).resolve().parents[2]


def assert_continues(straight: Path, stopped: Path, expected: outer.Trained, **options: Any) -> None:
    """Resumes the stopped run and compares everything it leaves with the straight one's."""
    assert_same_run(full_loop(stopped, **options).run(NUM_STEPS, resume=True), expected)
    assert records(stopped / "metrics.jsonl") == records(straight / "metrics.jsonl")
    last = f"checkpoints/step_{NUM_STEPS:08d}.safetensors"
    assert_same_checkpoint(stopped / last, straight / last)
    for folder in (straight, stopped):
        loaded = outer.load_hparams(folder / "checkpoints")
        assert all(torch.equal(loaded[name], expected.best_hparams[name]) for name in expected.best_hparams)


class FailingLogger(outer.MemoryLogger):
    def __init__(self, step: int, failure: BaseException) -> None:
        super().__init__()
        self._step, self._failure = step, failure

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if step == self._step:
            raise self._failure


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, outer.Trained]:
    folder = tmp_path_factory.mktemp("straight")
    trained = full_loop(folder).run(NUM_STEPS)
    # A resumed run must remember the best from before it was stopped.
    assert trained.best_step == 6
    return folder, trained


# The first checkpoint comes after 5 steps; 6, 12, 18 and 20 are validated.
@pytest.mark.parametrize("step", [1, 4, 5, 6, 11, 12, 17, 19])
def test_after_an_error_in_the_source(straight: tuple[Path, outer.Trained], tmp_path: Path, step: int) -> None:
    folder, expected = straight
    with pytest.raises(RuntimeError, match=r"the power went out"):
        full_loop(tmp_path, Quadratics(fail_at=step)).run(NUM_STEPS)
    assert_continues(folder, tmp_path, expected)


@pytest.mark.parametrize("step", [2, 6, 10, 18, 20])
def test_after_an_error_in_a_logger(straight: tuple[Path, outer.Trained], tmp_path: Path, step: int) -> None:
    folder, expected = straight
    loggers = [outer.JsonLinesLogger(tmp_path / "metrics.jsonl"), FailingLogger(step, OSError("the disk is full"))]
    with pytest.raises(OSError, match=r"the disk is full"):
        full_loop(tmp_path, loggers=loggers).run(NUM_STEPS)
    assert_continues(folder, tmp_path, expected)


@pytest.mark.parametrize("step", [1, 3, 7, 12, 18])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupt_writes_a_checkpoint_first(
    straight: tuple[Path, outer.Trained], tmp_path: Path, step: int, failure: BaseException
) -> None:
    folder, expected = straight
    with pytest.raises(type(failure)):
        full_loop(tmp_path, Quadratics(fail_at=step, failure=failure)).run(NUM_STEPS)
    newest = outer.Checkpoints(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.name == f"step_{step:08d}.safetensors"
    assert_continues(folder, tmp_path, expected)


@dataclass(frozen=True, kw_only=True)
class InterruptedValidation(Quadratics):
    """Interrupts the validations after the first, which is the trial before the run."""

    calls: list[int]
    nth: int

    def at(self, outer_step: int) -> ht.BilevelProblem:
        self.calls.append(outer_step)
        if self.calls.count(0) == self.nth:
            raise KeyboardInterrupt
        return super().at(outer_step)


@pytest.mark.parametrize(("nth", "step"), [(2, 6), (3, 12), (5, 20)])
def test_an_interrupt_during_a_validation(
    straight: tuple[Path, outer.Trained], tmp_path: Path, nth: int, step: int
) -> None:
    folder, expected = straight
    source = InterruptedValidation(offset=500, calls=[], nth=nth)
    validation = outer.Validation(source=source, every=6, num_episodes=10, metric="distance")
    with pytest.raises(KeyboardInterrupt):
        full_loop(tmp_path, validation=validation).run(NUM_STEPS)
    newest = outer.Checkpoints(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.name == f"step_{step:08d}.safetensors"
    assert_continues(folder, tmp_path, expected)


def test_an_interrupt_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        full_loop(tmp_path, Quadratics(fail_at=0, failure=KeyboardInterrupt())).run(NUM_STEPS)
    assert outer.Checkpoints(tmp_path / "checkpoints").newest() is None


def test_an_interrupt_in_the_middle_of_an_update_comes_after_it(
    straight: tuple[Path, outer.Trained], tmp_path: Path
) -> None:
    class Torn(torch.optim.Adam):
        """Between two variables of a step."""

        def step(self, closure: None = None) -> None:
            groups = self.param_groups
            variables = groups[0]["params"]
            for position, variable in enumerate(variables):
                groups[0]["params"] = [variable]
                super().step(closure)
                if position == 0 and self.state[variable]["step"] == 8:
                    signal.raise_signal(signal.SIGINT)
            groups[0]["params"] = variables

    folder, expected = straight
    optimizer = partial(Torn, lr=0.05)
    with pytest.raises(KeyboardInterrupt):
        full_loop(tmp_path, optimizer=optimizer).run(NUM_STEPS)
    newest = outer.Checkpoints(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.name == "step_00000008.safetensors"
    trained = full_loop(tmp_path, optimizer=optimizer).run(NUM_STEPS, resume=True)
    assert_same_run(trained, expected)
    assert records(tmp_path / "metrics.jsonl") == records(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def stopped_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the folders of runs whose processes got a signal."""
    folder = tmp_path_factory.mktemp("stopped")
    finished = subprocess.run(
        [sys.executable, "-m", "tests.outer.killed_run", str(folder), str(NUM_STEPS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.split() == ["kill", "-9", "terminate", "-15", "interrupt", "130"], finished.stderr
    return folder


@pytest.mark.parametrize("name", SIGNALS)
def test_after_a_signal_to_a_process(straight: tuple[Path, outer.Trained], stopped_processes: Path, name: str) -> None:
    folder, expected = straight
    assert_continues(folder, stopped_processes / name, expected)


def test_stopped_again_and_again(straight: tuple[Path, outer.Trained], tmp_path: Path) -> None:
    folder, expected = straight
    generator = random.Random(4)
    for _ in range(4):
        source = Quadratics(fail_at=generator.randrange(6, NUM_STEPS), failure=KeyboardInterrupt())
        try:
            full_loop(tmp_path, source).run(NUM_STEPS, resume=True)
        except KeyboardInterrupt:
            continue
    assert_continues(folder, tmp_path, expected)


def test_a_finished_run_returns_at_once(straight: tuple[Path, outer.Trained], tmp_path: Path) -> None:
    expected = full_loop(tmp_path).run(NUM_STEPS)
    refusing = Quadratics(fail_at=0)
    for num_outer_steps in (NUM_STEPS, NUM_STEPS - 7):
        again = full_loop(tmp_path, refusing).run(num_outer_steps, resume=True)
        assert_same_run(again, expected)
        assert again.seconds == pytest.approx(expected.seconds, rel=0.5)


def test_a_finished_run_can_be_prolonged(tmp_path: Path) -> None:
    source, optimizer = Quadratics(), partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    straight = make_loop(source, optimizer=optimizer).run(9)
    loop = make_loop(source, optimizer=optimizer, checkpoints=outer.Checkpoints(tmp_path))
    loop.run(4)
    assert_same_run(loop.run(9, resume=True), straight)


def test_resume_without_a_checkpoint_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "outer_loss": 5.0}\n{"ste')
    trained = full_loop(tmp_path).run(4, resume=True)
    assert trained.num_outer_steps == 4
    assert [record["step"] for record in records(path)] == [2, 4, 4]


def test_resume_needs_checkpoints() -> None:
    with pytest.raises(ValueError, match=r"`resume` is True, but the loop has no `checkpoints`"):
        make_loop().run(3, resume=True)


def test_a_fresh_run_refuses_the_folder_of_another(tmp_path: Path) -> None:
    full_loop(tmp_path).run(5)
    with pytest.raises(CheckpointError, match=r"`checkpoints` holds .*step_00000005.* of an earlier run"):
        full_loop(tmp_path).run(5)


# Every optimizer and scheduler that PyTorch offers for this kind of step


SMALL = Quadratics(num_tasks=None, num_steps=1)
SCHEDULERS = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
        partial(torch.optim.Adam, lr=0.05, amsgrad=True),
        partial(torch.optim.AdamW, lr=torch.tensor(0.05), foreach=False),
        partial(torch.optim.RMSprop, lr=0.02, centered=True, momentum=0.5),
        partial(torch.optim.Adagrad, lr=0.1),
        partial(torch.optim.Adadelta, lr=1.0),
        partial(torch.optim.ASGD, lr=0.05, t0=3, lambd=0.1),
        partial(torch.optim.Rprop, lr=0.01),
        partial(torch.optim.NAdam, lr=0.05),
        partial(torch.optim.RAdam, lr=0.05),
        partial(torch.optim.Adamax, lr=0.05),
    ],
    ids=lambda make: make.func.__name__,
)
def test_every_optimizer_resumes(tmp_path: Path, optimizer: Any) -> None:
    straight = make_loop(SMALL, optimizer=optimizer).run(9)
    checkpoints = outer.Checkpoints(tmp_path, every=5)
    make_loop(SMALL, optimizer=optimizer, checkpoints=checkpoints).run(5)
    assert_same_run(make_loop(SMALL, optimizer=optimizer, checkpoints=checkpoints).run(9, resume=True), straight)


def warmed_up(optimizer: torch.optim.Optimizer) -> Any:
    parts = [SCHEDULERS.LinearLR(optimizer, total_iters=3), SCHEDULERS.CosineAnnealingLR(optimizer, T_max=9)]
    return SCHEDULERS.SequentialLR(optimizer, parts, milestones=[3])


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(SCHEDULERS.MultiStepLR, milestones=[2, 6, 8], gamma=0.3),
        partial(SCHEDULERS.CosineAnnealingLR, T_max=12),
        partial(SCHEDULERS.OneCycleLR, max_lr=0.1, total_steps=9),
        partial(SCHEDULERS.CosineAnnealingWarmRestarts, T_0=5),
        partial(SCHEDULERS.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
        partial(SCHEDULERS.LambdaLR, lr_lambda=lambda step: 0.9**step),
        warmed_up,
    ],
    ids=lambda make: getattr(make, "func", make).__name__,
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_every_scheduler_resumes(tmp_path: Path, scheduler: Any) -> None:
    settings: dict[str, Any] = {"optimizer": partial(torch.optim.Adam, lr=0.05), "scheduler": scheduler}
    straight = make_loop(SMALL, **settings).run(9)
    checkpoints = outer.Checkpoints(tmp_path, every=5)
    make_loop(SMALL, **settings, checkpoints=checkpoints).run(5)
    assert_same_run(make_loop(SMALL, **settings, checkpoints=checkpoints).run(9, resume=True), straight)


def test_the_task_route_is_that_of_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypertorch.outer import run as run_module

    answers = iter([ht.Execution(tasks="loop")])
    monkeypatch.setattr(run_module, "measured_execution", lambda *args, **named: next(answers))
    full_loop(tmp_path, Quadratics(), execution=ht.Execution()).run(5)
    full_loop(tmp_path, Quadratics(), execution=ht.Execution()).run(7, resume=True)
    newest = outer.Checkpoints(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert outer.Checkpoints(tmp_path).load(newest).task_route == "loop"


def test_validations_take_the_same_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypertorch.outer import run as run_module

    routes: list[str] = []
    original = run_module.evaluate
    monkeypatch.setattr(run_module, "measured_execution", lambda *args, **named: ht.Execution(tasks="loop"))
    monkeypatch.setattr(
        run_module,
        "evaluate",
        lambda *args, execution, **named: routes.append(execution.tasks) or original(*args, **named),
    )
    full_loop(tmp_path, Quadratics(), execution=ht.Execution()).run(6)
    assert routes == ["loop", "loop"]


# What does not fit


@dataclass(frozen=True, kw_only=True)
class Renamed(Quadratics):
    hparams: Mapping[str, torch.Tensor]

    def init_hparams(self) -> TensorDict:
        return dict(self.hparams)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": torch.zeros(4, dtype=torch.float64)}, r"`start` \(float64 \(3,\) in the checkpoint, float64 \(4,\)"),
        ({"start": torch.zeros(3)}, r"`start` \(float64 \(3,\) in the checkpoint, float32 \(3,\) in the problem\)"),
        ({"more": torch.zeros(1)}, r"`more` \(absent in the checkpoint, float32 \(1,\) in the problem\)"),
    ],
)
def test_other_hparams_are_refused(tmp_path: Path, changed: TensorDict, message: str) -> None:
    full_loop(tmp_path).run(5)
    source = Renamed(hparams={**Quadratics().init_hparams(), **changed})
    with pytest.raises(CheckpointError, match=message):
        full_loop(tmp_path, source).run(6, resume=True)


def test_missing_or_reordered_hparams_are_refused(tmp_path: Path) -> None:
    full_loop(tmp_path).run(5)
    hparams = Quadratics().init_hparams()
    with pytest.raises(CheckpointError, match=r"`curvature` \(float64 \(\) in the checkpoint, absent in the problem\)"):
        full_loop(tmp_path, Renamed(hparams={"start": hparams["start"]})).run(6, resume=True)
    with pytest.raises(CheckpointError, match=r"their order"):
        full_loop(tmp_path, Renamed(hparams=dict(reversed(hparams.items())))).run(6, resume=True)


@dataclass(frozen=True, kw_only=True)
class Warm(Quadratics):
    """Quadratics that go on from the last inner state; `start` reaches the outer loss at the first step only."""

    def at(self, outer_step: int) -> ht.BilevelProblem:
        return replace(super().at(outer_step), warm_start=True, allow_unused=("start",))


def test_a_warm_started_run_resumes(tmp_path: Path) -> None:
    straight = make_loop(Warm()).run(8)
    checkpoints = outer.Checkpoints(tmp_path, every=3)
    make_loop(Warm(), checkpoints=checkpoints).run(3)
    newest = checkpoints.newest()
    assert newest is not None
    assert checkpoints.load(newest).carry.keys() == {"params.w", "index"}
    assert_same_run(make_loop(Warm(), checkpoints=checkpoints).run(8, resume=True), straight)
