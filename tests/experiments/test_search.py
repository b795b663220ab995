"""The search of `scripts/train --multirun hydra/sweeper=search`, through the real command on a small experiment."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from hypertorch.search import hyperband
from tests.experiments.commands import Command

# Half a second a run.
SMALL = (
    "experiment=rotation",
    "experiment.num_steps=2",
    "experiment.final_steps=3",
    "experiment.hidden=4",
    "outer_loop.num_outer_steps=2",
    "outer_loop.log_every=1",
    "outer_loop.progress=false",
    "validation.every=1",
    "validation.num_episodes=1",
)
LR = "outer_optimizer.lr=tag(log,interval(1e-2,1e1))"
MOMENTUM = "dynamics.momentum=interval(0,0.9)"


def search(command: Command, *words: str, folder: str = "sweep") -> tuple[int, str]:
    return command("--multirun", "hydra/sweeper=search", *SMALL, f"paths.sweep_dir={folder}", *words)


def settings(**values: object) -> list[str]:
    return [f"hydra.sweeper.{name}={value}" for name, value in values.items()]


def study(path: str | Path = "sweep/study.journal", name: str = "search") -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.load_study(study_name=name, storage=storage)


def states(one: optuna.Study) -> list[str]:
    return [trial.state.name for trial in one.trials]


def records(folder: str | Path) -> list[dict[str, float]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "per_second" not in name} for line in lines]


def steps_run(folders: Sequence[Path]) -> int:
    """The outer steps whose record was written, each counted as often as it was taken."""
    return sum("hypergradient_norm" in record for folder in folders for record in records(folder))


def printed_commands(out: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in out.splitlines() if line.strip().startswith("scripts/train")]


SAMPLERS: dict[str, list[str]] = {
    "random": [],
    "qmc": [],
    "tpe": ["hydra.sweeper.settings={n_startup_trials:2}"],
    "gp": ["hydra.sweeper.settings={n_startup_trials:2}"],
    "cmaes": [],
    "nsga2": ["hydra.sweeper.settings={population_size:2}"],
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_searches(sampler: str, command: Command) -> None:
    code, error = search(command, LR, MOMENTUM, *settings(sampler=sampler, num_trials=4), *SAMPLERS[sampler])
    assert code == 0, error
    found = study()
    assert states(found) == ["COMPLETE"] * 4
    assert len({tuple(trial.params.values()) for trial in found.trials}) == 4
    # An accuracy: the larger the better, and the value is the best validation that the run has seen.
    assert found.direction.name == "MAXIMIZE"
    for trial in found.trials:
        seen = [one["validation/accuracy"] for one in records(f"sweep/{trial.number}") if "validation/accuracy" in one]
        assert trial.value == max(seen)


def test_the_grid_runs_each_point_once_and_no_test_is_seen(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = search(
        command, "outer_optimizer.lr=0.5,2", "experiment.hidden=range(3,5)", "hydra.sweeper.sampler=grid"
    )
    assert code == 0, error
    found = study()
    points = [(trial.params["outer_optimizer.lr"], trial.params["experiment.hidden"]) for trial in found.trials]
    assert sorted(points) == [("0.5", 3), ("0.5", 4), ("2", 3), ("2", 4)]
    folders = [Path("sweep") / str(number) for number in range(4)]
    for folder in folders:
        assert not (folder / "results.json").exists()
        assert not any("test" in name for record in records(folder) for name in record)
    with Path("sweep/trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation"]) for row in rows] == [trial.value for trial in found.trials]
    for picture in ("history", "slices", "parallel_coordinates"):
        assert Path(f"sweep/{picture}.png").stat().st_size > 1000


def test_what_it_prints_can_be_pasted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    from rich.console import Console

    monkeypatch.setattr(Console, "print", lambda self, *what, **_: shown.extend(map(str, what)))
    code, error = search(command, LR, *settings(sampler="random", num_trials=2))
    assert code == 0, error
    anew, again = printed_commands("\n".join(shown))
    best = study().best_trial
    assert f"outer_optimizer.lr={best.params['outer_optimizer.lr']!r}" in anew
    assert set(anew) < set(again)
    code, error = command(*again)
    assert code == 0, error
    results = json.loads(Path(f"sweep/{best.number}/results.json").read_text())
    assert set(results["metrics"]) == {"validation", "test"}
    assert results["num_outer_steps"] == 2
    code, error = command(*anew, "paths.run_dir=anew")
    assert code == 0, error
    assert records("anew") == records(f"sweep/{best.number}")


def test_several_objectives_with_the_direction_of_each(command: Command) -> None:
    code, error = search(
        command,
        LR,
        *settings(sampler="nsga2", num_trials=3, objectives="[validation,seconds]"),
        "experiment.hidden=2,64",
    )
    assert code == 0, error
    found = study()
    assert [direction.name for direction in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert all(len(trial.values) == 2 and trial.values[1] > 0 for trial in found.trials)
    assert Path("sweep/front.png").stat().st_size > 1000


def test_a_loss_is_minimised(command: Command) -> None:
    """The same search on an experiment that is validated by its loss."""
    words = ("experiment=sinusoid", "debug=fewshot", "outer_loop.progress=false", "paths.sweep_dir=sweep")
    code, error = command(
        "--multirun", "hydra/sweeper=search", *words, "outer_optimizer.lr=interval(0.001,0.01)", *settings(num_trials=2)
    )
    assert code == 0, error
    assert study().direction.name == "MINIMIZE"


def test_a_trial_that_diverges_fails_and_the_search_goes_on(command: Command) -> None:
    code, error = search(command, "dynamics.lr=0.1,1e38", "hydra.sweeper.sampler=grid")
    assert code == 0, error
    found = study()
    assert states(found) == ["COMPLETE", "FAIL"]
    assert "NaN or infinity" in found.trials[1].user_attrs["why"]
    assert found.best_trial.number == 0
    assert "error" not in error


def test_a_search_of_which_nothing_is_left_fails(command: Command) -> None:
    code, error = search(command, "dynamics.lr=1e37,1e38", "hydra.sweeper.sampler=grid")
    assert code == 1
    assert "2 trials all ended without a value" in error and "NaN or infinity" in error


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "misspelt setting": (("outer_optimzer.lr=interval(0,1)", "hydra.sweeper.num_trials=2"), "outer_optimzer.lr"),
    "misspelt setting of the search": ((LR, "hydra.sweeper.num_trails=2"), "`hydra.sweeper.num_trails` is no setting"),
    "nothing to search": (("hydra.sweeper.num_trials=2",), "there is nothing to search"),
    "no number": ((LR,), "`hydra.sweeper.num_trials` is not given"),
    "a number for the grid": (("seed=0,1", *settings(sampler="grid", num_trials=2)), "grid runs every point once"),
    "unknown sampler": ((LR, *settings(sampler="tep", num_trials=2)), "Use one of: random, grid, qmc, tpe"),
    "unknown argument of the sampler": (
        (LR, *settings(num_trials=2, settings="{n_starts:2}")),
        "which Optuna's sampler tpe refuses",
    ),
    "end of a range": (("outer_optimizer.lr=interval(-1,1)", *settings(num_trials=2)), "Invalid learning rate: -1"),
    "one choice": (("outer_optimizer.lr=1,fast", *settings(num_trials=2)), "fast"),
    "empty interval": (("outer_optimizer.lr=interval(2,1)", *settings(num_trials=2)), "is no interval"),
    "choices for numbers": (("seed=0,1", LR, *settings(sampler="cmaes", num_trials=2)), "`seed` is a choice"),
    "one number for a covariance": ((LR, *settings(sampler="cmaes", num_trials=2)), "alone is searched"),
    "unknown objective": ((LR, *settings(num_trials=2, objectives="[test]")), "Use some of: validation, seconds"),
    "wrong direction": ((LR, *settings(num_trials=2, directions="[min]")), r"the experiment says ['max'] is better"),
    "the test": ((LR, *settings(num_trials=2), "evaluation.splits=[test]"), "the test stays unseen"),
    "resume": ((LR, *settings(num_trials=2), "resume=true"), "a search goes on by itself"),
    "pruner without rungs": (
        (LR, *settings(num_trials=2, pruner="successive_halving")),
        "`hydra.sweeper.min_steps` is not",
    ),
    "rungs without pruner": ((LR, *settings(num_trials=2, min_steps=2)), "`hydra.sweeper.pruner` is null"),
    "length that is no rung": (
        (LR, *settings(pruner="hyperband", min_steps=2), "outer_loop.num_outer_steps=5"),
        "leave out the length 5 of the run",
    ),
    "rungs between validations": (
        (LR, *settings(pruner="hyperband", min_steps=1, eta=2), "validation.every=2"),
        "`validation.every` is 2, but a rung of the search ends after 1",
    ),
    "what grows with the run": (
        (LR, *settings(pruner="hyperband", min_steps=1, eta=2), "+experiment.foo=1"),
        "experiment.foo",
    ),
    "racing without seeds": ((LR, *settings(num_trials=2, racing=True)), "`hydra.sweeper.seeds` is 1"),
    "two objectives with rungs": (
        (LR, *settings(pruner="hyperband", min_steps=1, eta=2, objectives="[validation,seconds]")),
        "which goes by one number",
    ),
    "storage": ((LR, *settings(num_trials=2, storage="nonsense://a")), "`hydra.sweeper.storage` is 'nonsense://a'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_before_the_first_trial(case: str, command: Command, tmp_path: Path) -> None:
    words, expected = REFUSED[case]
    code, error = search(command, *words)
    assert code == 1
    assert expected in error and error.count("\n") == 1, error
    assert not (tmp_path / "sweep/0").exists()


def test_experiments_with_other_directions_are_no_one_search(command: Command) -> None:
    words = ("experiment=noisy_digits,data_cleaning", "debug=default", *settings(num_trials=2))
    code, error = command("--multirun", "hydra/sweeper=search", *words)
    assert code == 1 and "which is better ('max',) with experiment=noisy_digits and ('min',) with" in error


def test_experiments_that_cannot_go_on_are_refused(command: Command) -> None:
    halving = settings(pruner="successive_halving", num_trials=2, min_steps=1, eta=2)
    code, error = command("--multirun", "hydra/sweeper=search", "experiment=sinusoid", "debug=fewshot", LR, *halving)
    assert code == 1 and "`execution.tasks` is 'auto', which is measured" in error
    code, error = command("--multirun", "hydra/sweeper=search", "experiment=real_time", "debug=default", LR, *halving)
    assert code == 1 and "`experiment.num_updates` depends on `outer_loop.num_outer_steps`" in error


def test_a_schedule_length_without_a_schedule_is_refused(command: Command) -> None:
    code, error = command(*SMALL, "outer_loop.scheduler=null", "outer_loop.schedule_length=9")
    assert code == 1 and "`outer_loop.schedule_length` is given, but the run has no learning-rate schedule" in error


def test_a_schedule_of_its_own_length_lets_a_run_be_lengthened(command: Command) -> None:
    words = (*SMALL, "outer_loop.schedule_length=4")
    assert command(*words, "paths.run_dir=straight", "outer_loop.num_outer_steps=4")[0] == 0
    assert command(*words, "paths.run_dir=longer")[0] == 0
    code, error = command(*words, "paths.run_dir=longer", "outer_loop.num_outer_steps=4", "resume=true")
    assert code == 0, error
    assert records("longer") == records("straight")
    code, error = command(*SMALL, "paths.run_dir=longer", "outer_loop.num_outer_steps=4", "resume=true")
    assert code == 0, error  # the default is the length of the run, which is that length again
    code, error = command(*SMALL, "paths.run_dir=longer", "outer_loop.num_outer_steps=6", "resume=true")
    assert code == 1 and "`outer_loop.scheduler.T_max` is 6, but the run in" in error


def test_the_same_command_goes_on_and_another_is_refused(command: Command) -> None:
    assert search(command, LR, *settings(sampler="random", num_trials=2))[0] == 0
    first = [trial.params for trial in study().trials]
    assert search(command, LR, *settings(sampler="random", num_trials=3))[0] == 0
    assert [trial.params for trial in study().trials][:2] == first and len(study().trials) == 3
    # A sampler that began with the same draws again would find nothing new.
    assert study().trials[2].params not in first
    code, error = search(command, MOMENTUM, *settings(sampler="random", num_trials=3))
    assert code == 1 and "has a study 'search' whose space is" in error
    code, error = search(command, LR, "seed=1", *settings(sampler="random", num_trials=3))
    assert code == 1 and "whose command is" in error
    code, error = search(command, LR, *settings(sampler="random", num_trials=3, storage="memory"))
    assert code == 1 and "where there are trials already, but their study is not in `hydra.sweeper.storage`" in error


def test_a_database_and_a_folder_of_their_own(command: Command) -> None:
    words = (LR, *settings(sampler="random", num_trials=1, storage="sqlite:///one.db", study_name="mine"))
    code, error = search(command, *words)
    assert code == 0, error
    code, error = command(
        "--multirun", "hydra/sweeper=search", *SMALL, *words, "hydra.sweeper.num_trials=2"
    )  # without the folder: the study knows it
    assert code == 0, error
    assert Path("sweep/1/metrics.jsonl").exists()
    found = optuna.load_study(study_name="mine", storage="sqlite:///one.db")
    assert states(found) == ["COMPLETE"] * 2


def test_conditions_leave_a_setting_out(command: Command) -> None:
    code, error = search(
        command,
        "outer_optimizer=adam,sgd",
        "outer_optimizer.momentum=0.1,0.5",
        "hydra.sweeper.sampler=grid",
        "hydra.sweeper.conditions={outer_optimizer.momentum:'outer_optimizer=sgd'}",
    )
    assert code == 0, error
    assert [list(trial.params.values()) for trial in study().trials] == [["adam"], ["sgd", "0.1"], ["sgd", "0.5"]]


def test_hyperband_goes_on_bit_for_bit_and_runs_as_many_steps_as_computed(command: Command) -> None:
    code, error = search(
        command,
        LR,
        *settings(sampler="random", pruner="hyperband", min_steps=1, eta=2),
        "outer_loop.num_outer_steps=4",
    )
    assert code == 0, error
    brackets = hyperband(1, 4, 2)
    found = study()
    assert len(found.trials) == sum(bracket.sizes[0] for bracket in brackets)
    assert steps_run(sorted(Path("sweep").glob("[0-9]*"))) == sum(bracket.continued_steps for bracket in brackets)
    ended = [max(trial.intermediate_values) for trial in found.trials]
    start = 0
    for bracket in brackets:
        mine = ended[start : start + bracket.sizes[0]]
        for steps, size in zip(bracket.steps, bracket.sizes, strict=True):
            assert sum(step >= steps for step in mine) == size
        start += bracket.sizes[0]
    for trial in found.trials:
        assert trial.state is (TrialState.COMPLETE if max(trial.intermediate_values) == 4 else TrialState.PRUNED)
        assert trial.value == trial.intermediate_values[max(trial.intermediate_values)]
    # One that went through all rungs, beside one that ran straight.
    longest = next(trial for trial in found.trials if len(trial.intermediate_values) == 3)
    code, error = command(
        *SMALL,
        "outer_loop.num_outer_steps=4",
        f"outer_optimizer.lr={longest.params['outer_optimizer.lr']!r}",
        "paths.run_dir=straight",
    )
    assert code == 0, error
    assert records("straight") == records(f"sweep/{longest.number}")
    own, straight = (
        Path(folder) / "checkpoints/hparams.safetensors" for folder in (f"sweep/{longest.number}", "straight")
    )
    assert own.read_bytes() == straight.read_bytes()


def test_the_better_half_goes_on(command: Command) -> None:
    code, error = search(
        command,
        LR,
        *settings(sampler="random", pruner="successive_halving", num_trials=4, min_steps=1, eta=2),
        "outer_loop.num_outer_steps=2",
    )
    assert code == 0, error
    first = [trial.intermediate_values[1] for trial in study().trials]
    ordered = sorted(range(4), key=lambda number: (-first[number], number))
    assert [number for number in range(4) if 2 in study().trials[number].intermediate_values] == sorted(ordered[:2])


def test_seeds_give_the_mean_and_racing_ends_the_worse(command: Command) -> None:
    # An angle that never moves is worse at every seed.
    code, error = search(
        command,
        "experiment.num_steps=8,1",
        *settings(sampler="grid", seeds=3),
    )
    assert code == 0, error
    for trial in study().trials:
        values = [
            max(one.get("validation/accuracy", 0.0) for one in records(f"sweep/{trial.number}/seed_{k}"))
            for k in (0, 1, 2)
        ]
        assert trial.user_attrs["values"] == values
        assert trial.value == pytest.approx(sum(values) / 3, abs=1e-12)
