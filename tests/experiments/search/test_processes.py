"""Searches that end before their time, and several processes that share one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.trial import TrialState

import hypertorch as ht
from experiments import train
from hydra_plugins.hypertorch_search._space import read_space
from hydra_plugins.hypertorch_search._study import Studied
from hypertorch.search.processes import Process
from tests.experiments.commands import Command
from tests.experiments.search.searches import LR, search, settings, states, steps_run, study


def test_what_a_process_leaves_behind_is_taken_up(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug ends the search with its traceback; the same command finishes the trial that it ended in."""
    words = (LR, *settings(sampler="random", num_trials=3), "outer_loop.checkpoints.every=1")
    real, calls = ht.OuterLoop.run, []

    def run(self: ht.OuterLoop, num_outer_steps: int, **rest: object) -> ht.Trained:
        calls.append(num_outer_steps)
        if len(calls) == 2:
            real(self, 1, **rest)
            raise ZeroDivisionError
        return real(self, num_outer_steps, **rest)

    monkeypatch.setattr(ht.OuterLoop, "run", run)
    with pytest.raises(ZeroDivisionError):
        search(command, *words)
    assert states(study()) == ["COMPLETE", "RUNNING"]
    left = study().trials[1].params
    code, error = search(command, *words)
    assert code == 0, error
    assert "resuming in" in error
    assert states(study()) == ["COMPLETE"] * 3 and study().trials[1].params == left
    assert steps_run([Path("sweep/1")]) == 2  # one before, one after
    assert len(calls) == 4


@pytest.mark.slow
def test_a_trial_that_counts_seconds_begins_anew(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU seconds of its second part are not those of the trial."""
    words = (LR, *settings(sampler="random", num_trials=1, objectives="[validation,seconds]"))
    real = ht.OuterLoop.run

    def run(self: ht.OuterLoop, num_outer_steps: int, **rest: object) -> ht.Trained:
        real(self, 1, **rest)
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(ht.OuterLoop, "run", run)
        with pytest.raises(ZeroDivisionError):
            search(command, *words)
    code, error = search(command, *words)
    assert code == 0, error
    assert "resuming" not in error
    assert steps_run([Path("sweep/0_attempt_1")]) == 2 and steps_run([Path("sweep/0")]) == 1


@pytest.mark.slow
def test_a_trial_of_a_living_process_is_left_alone(command: Command) -> None:
    words = (LR, *settings(sampler="random", num_trials=2))
    assert search(command, *words, "hydra.sweeper.num_trials=1")[0] == 0
    one = study()
    storage = one._storage
    with Process(storage, storage.get_study_id_from_name("search")) as other:
        theirs = one.ask()
        theirs.set_user_attr("process", other.name)
        assert search(command, *words)[0] == 0
        assert states(study()) == ["COMPLETE", "RUNNING"]
        code, error = search(command, *words, *settings(pruner="successive_halving", min_steps=1, eta=2))
        assert code == 1 and "whose pruner is None" in error
    assert search(command, *words)[0] == 0
    assert states(study()) == ["COMPLETE", "COMPLETE"]


def test_a_trial_without_a_name_is_left_where_no_other_process_is_at_work() -> None:
    """A process that was killed between beginning it and writing its name on it; a living one is about to."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.InMemoryStorage()
    one = optuna.create_study(storage=storage, study_name="search")
    one.enqueue_trial({"lr": "0.5"})
    one.ask()
    space = read_space(OverridesParser.create().parse_overrides(["lr=0.5,1.0"]), {})
    with Process(storage, 0) as process:
        studied = Studied(one, storage, process, space)
        with Process(storage, 0):
            assert studied.take_up(2) == []
        assert [drawn.number for drawn in studied.take_up(2)] == [0]
        assert studied.take_up(2) == []


TRAIN = Path(train.__file__)
LONGER = (
    *("experiment=rotation", "outer_loop.num_outer_steps=20", "outer_loop.checkpoints.every=1", "validation.every=5"),
    *("outer_loop.progress=false", "paths.sweep_dir=sweep"),
)


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A search in a process of its own."""
    path = os.pathsep.join([str(TRAIN.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(TRAIN), "--multirun", "hydra/sweeper=search", *LONGER, LR, *words]
    return subprocess.Popen(
        line, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_a_killed_search_loses_at_most_the_batch_that_ran(tmp_path: Path) -> None:
    words = settings(sampler="tpe", num_trials=4)
    first = started(tmp_path, *words)
    deadline = time.monotonic() + 120.0
    while not (tmp_path / "sweep/1/checkpoints/step_00000004.safetensors").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.communicate()
    before = study(tmp_path / "sweep/study.journal")
    assert states(before) == ["COMPLETE", "RUNNING"]
    begun = [trial.params for trial in before.trials]
    second = started(tmp_path, *words)
    out, _ = second.communicate()
    assert second.returncode == 0, out
    after = study(tmp_path / "sweep/study.journal")
    assert states(after) == ["COMPLETE"] * 4
    assert [trial.params for trial in after.trials[:2]] == begun
    # The killed trial went on: no step but that under way was taken again, and its record replaced.
    assert steps_run([tmp_path / "sweep/1"]) == 20
    assert "resuming in" in out


@pytest.mark.slow
def test_two_processes_share_one_study(tmp_path: Path) -> None:
    both = [started(tmp_path, *settings(sampler="random", num_trials=8)) for _ in range(2)]
    outs = [one.communicate()[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], outs
    found = study(tmp_path / "sweep/study.journal")
    ran = [trial for trial in found.trials if trial.state is TrialState.COMPLETE]
    assert len(ran) == 8 and {trial.number for trial in ran} == set(range(8))
    assert len({trial.params["outer_optimizer.lr"] for trial in ran}) == 8
    assert len({trial.user_attrs["process"] for trial in ran}) == 2


@pytest.mark.slow
def test_trials_beside_each_other_by_joblib(tmp_path: Path) -> None:
    words = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "dynamics.lr=0.1,1e38")
    one = started(tmp_path, *words, *settings(sampler="random", num_trials=4, n_jobs=2))
    out, _ = one.communicate()
    assert one.returncode == 0, out
    found = study(tmp_path / "sweep/study.journal")
    for trial in found.trials:
        assert trial.state.name == ("COMPLETE" if trial.params["dynamics.lr"] == "0.1" else "FAIL")
    assert {trial.state.name for trial in found.trials} == {"COMPLETE", "FAIL"}
