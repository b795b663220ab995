"""The search of `scripts/train --multirun hydra/sweeper=search`, through the real command on a small experiment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from optuna.trial import TrialState

import hypertorch as ht
from experiments import train
from experiments.common.commands.config_errors import CONFIGS
from hydra_plugins.hypertorch_search import sweeper
from hydra_plugins.hypertorch_search._settings import check_settings
from hydra_plugins.hypertorch_search._space import overrides_of, read_space
from hydra_plugins.hypertorch_search.config import SearchConfig
from hypertorch.search import hyperband, is_worse
from hypertorch.search.halving import rungs
from tests.experiments.commands import Command
from tests.experiments.search.searches import (
    LR,
    MOMENTUM,
    SMALL,
    best_accuracy,
    printed_commands,
    records,
    search,
    settings,
    states,
    steps_run,
    study,
    table,
)
from tests.helpers import pages

TRAIN = Path(train.__file__)


SAMPLERS: dict[str, list[str]] = {
    "random": [],
    "qmc": [],
    "tpe": ["hydra.sweeper.settings={n_startup_trials:1}"],
    "gp": ["hydra.sweeper.settings={n_startup_trials:1}"],
    "cmaes": [],
    "nsga2": ["hydra.sweeper.settings={population_size:2}"],
    "observer": ["hydra.sweeper.settings={num_initial:1,trusted_move:0.1}"],
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "sampler",
    [pytest.param(name, marks=() if name in ("random", "tpe", "observer") else pytest.mark.slow) for name in SAMPLERS],
)
def test_every_sampler_searches(sampler: str, command: Command) -> None:
    code, error = search(command, LR, MOMENTUM, *settings(sampler=sampler, num_trials=3), *SAMPLERS[sampler])
    assert code == 0, error
    found = study()
    assert states(found) == ["COMPLETE"] * 3
    assert len({tuple(trial.params.values()) for trial in found.trials}) == 3
    # An accuracy: the larger the better, and the value is the best validation that the run has seen.
    assert found.direction.name == "MAXIMIZE"
    for trial in found.trials:
        seen = [one["validation/accuracy"] for one in records(f"sweep/{trial.number}") if "validation/accuracy" in one]
        assert trial.value == max(seen)


def test_the_grid_runs_each_point_once_and_no_test_is_seen(command: Command, pictures: None) -> None:
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
    assert [float(row["validation"]) for row in table()] == [trial.value for trial in found.trials]
    for picture in ("history", "slices", "parallel_coordinates"):
        assert Path(f"sweep/{picture}.png").stat().st_size > 1000


def test_what_it_prints_can_be_pasted(command: Command, shown: list[str]) -> None:
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


@pytest.mark.slow
def test_a_search_begins_where_it_is_told_to(command: Command) -> None:
    starts = "hydra.sweeper.starts=[{outer_optimizer.lr:0.5,outer_optimizer.momentum:0.25},{outer_optimizer.lr:2}]"
    words = (LR, MOMENTUM, *settings(sampler="random", num_trials=3), starts)
    code, error = search(command, *words)
    assert code == 0, error
    first, second, third = (trial.params for trial in study().trials)
    assert first == {"outer_optimizer.lr": 0.5, "outer_optimizer.momentum": 0.25}
    assert second["outer_optimizer.lr"] == 2 and third["outer_optimizer.lr"] != 2


def test_several_objectives_with_the_direction_of_each(command: Command, pictures: None) -> None:
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_search_of_which_nothing_is_left_fails(command: Command) -> None:
    code, error = search(command, "dynamics.lr=1e37,1e38", "hydra.sweeper.sampler=grid")
    assert code == 1
    assert "2 trials all ended without a value" in error and "NaN or infinity" in error


@pytest.mark.parametrize(
    "words", [words for words in pages.commands("docs/search.md") if "--multirun" in words], ids=str
)
def test_the_commands_of_the_page_would_be_searched(words: list[str]) -> None:
    parsed = OverridesParser.create().parse_overrides(words[2:])
    fixed = [item.input_line for item in parsed if not item.is_sweep_override()]
    swept = [item for item in parsed if item.is_sweep_override()]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        one = compose("train", fixed, return_hydra_config=True).hydra.sweeper
        chosen = SearchConfig(**OmegaConf.to_container(one))
        space = read_space(swept, chosen.conditions or {})
        check_settings(chosen, space)
        for point in space.ends():
            assert compose("train", [*fixed, *overrides_of(point)])
        if chosen.pruner is not None:
            length = compose("train", fixed).outer_loop.num_outer_steps
            assert all(steps % 5 == 0 for steps in rungs(chosen.min_steps, length, chosen.eta or 3))


def test_the_savings_of_the_page_are_those_of_the_brackets() -> None:
    (row,) = [cells for cells in pages.rows("docs/search.md") if cells[0] == "10, 160, 2"]
    brackets = hyperband(10, 160, 2)
    trials = sum(bracket.sizes[0] for bracket in brackets)
    steps, restarted = (sum(getattr(one, name) for one in brackets) for name in ("continued_steps", "restarted_steps"))
    assert row[1:] == [str(trials), str(steps), str(restarted), f"{100 * (1 - steps / restarted):.1f} %"]


@pytest.mark.slow
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
    for _ in range(2):  # a study that was refused is none the next time either
        other = settings(sampler="random", num_trials=3, storage="other.journal")
        code, error = search(command, LR, *other)
    assert code == 1 and "where there are trials already, but their study is not in `hydra.sweeper.storage`" in error


def test_a_study_whose_end_was_torn_goes_on(command: Command) -> None:
    words = (LR, *settings(sampler="random", num_trials=2))
    assert search(command, *words)[0] == 0
    path = Path("sweep/study.journal")
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 15)
    for number in (3, 4):  # once more: what was written behind the torn line must be readable
        code, error = search(command, *words, f"hydra.sweeper.num_trials={number}")
        assert code == 0, error
    assert states(study()) == ["COMPLETE"] * 4
    path.write_bytes(whole.replace(b"\n", b"\n{torn\n", 1))
    code, error = search(command, *words)
    assert code == 1 and "sweep/study.journal', whose line 2 is no record of a study" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_database_and_a_folder_of_their_own(command: Command) -> None:
    space = "hydra.sweeper.params={outer_optimizer.lr:'interval(0.1,1)'}"  # as a file of settings would have it
    words = (space, *settings(sampler="random", num_trials=1, storage="sqlite:///one.db", study_name="mine"))
    code, error = search(command, *words)
    assert code == 0, error
    code, error = command(
        "--multirun", "hydra/sweeper=search", *SMALL, *words, "hydra.sweeper.num_trials=2"
    )  # without the folder: the study knows it
    assert code == 0, error
    assert Path("sweep/1/metrics.jsonl").exists()
    found = optuna.load_study(study_name="mine", storage="sqlite:///one.db")
    assert states(found) == ["COMPLETE"] * 2


@pytest.mark.slow
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


@pytest.mark.slow
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
    own, straight = (ht.Checkpoints(Path(folder) / "checkpoints") for folder in (f"sweep/{longest.number}", "straight"))
    own, straight = (one.load(newest) for one in (own, straight) if (newest := one.newest()) is not None)
    for name in ("hparams", "best_hparams"):
        assert all(torch.equal(value, getattr(straight, name)[key]) for key, value in getattr(own, name).items())
    assert (own.step, own.best_step, own.best_value) == (4, straight.best_step, straight.best_value)


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 5])
def test_rungs_that_were_interrupted_go_on(at: int, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first rung, where some trials have not begun, and in the second."""
    words = (LR, *settings(sampler="random", pruner="successive_halving", num_trials=4, min_steps=1, eta=2))
    assert search(command, *words, folder="whole")[0] == 0
    real, calls = ht.OuterLoop.run, []

    def run(self: ht.OuterLoop, num_outer_steps: int, **rest: object) -> ht.Trained:
        calls.append(num_outer_steps)
        if len(calls) == at:
            raise ZeroDivisionError
        return real(self, num_outer_steps, **rest)

    monkeypatch.setattr(ht.OuterLoop, "run", run)
    with pytest.raises(ZeroDivisionError):
        search(command, *words)
    assert search(command, *words)[0] == 0
    found, whole = study().trials, study("whole/study.journal").trials
    for one, other in zip(found, whole, strict=True):
        assert (one.state, one.params) == (other.state, other.params)
        assert (one.values, one.intermediate_values) == (other.values, other.intermediate_values)
    assert steps_run([Path(f"sweep/{number}") for number in range(4)]) == 4 * 1 + 2 * 1
    assert len(calls) == 7  # six, and that which ended


@pytest.mark.slow
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


@pytest.mark.slow
def test_seeds_give_the_mean(command: Command, shown: list[str]) -> None:
    code, error = search(command, "experiment.num_steps=8,1", *settings(sampler="grid", seeds=2))
    assert code == 0, error
    for trial in study().trials:
        values = [best_accuracy(f"sweep/{trial.number}/seed_{index}") for index in range(2)]
        assert values[0] != values[1]
        assert trial.user_attrs["values"] == values
        assert trial.value == pytest.approx(sum(values) / 2, abs=1e-12)
    assert {(row["seeds"], row["last_step"]) for row in table()} == {("2", "")}
    (line,) = [line for line in shown if line.startswith("best: ")]
    number = study().best_trial.number
    assert f"trial {number}, the mean of 2 seeds. Anew with the first of them only" in line
    assert line.endswith("(for another add seed=1):")
    # What the line says: one seed each, the runs that the mean is of.
    (anew,) = printed_commands("\n".join(shown))
    for index, more in enumerate([[], ["seed=1"]]):
        assert command(*anew, *more, f"paths.run_dir=anew_{index}")[0] == 0
        assert best_accuracy(f"anew_{index}") == study().best_trial.user_attrs["values"][index]


@pytest.mark.slow
def test_a_race_ends_at_the_first_seed_at_which_the_test_says_so(command: Command) -> None:
    # Images are recognised at one rate, and at the other the net stays as it was.
    words = ("experiment.num_steps=20", "experiment.hidden=32", "dynamics.lr=0.1,1e-9")
    code, error = search(command, *words, *settings(sampler="grid", seeds=4, racing="true"))
    assert code == 0, error
    best, worse = study().trials
    assert best.state is TrialState.COMPLETE and worse.state is TrialState.PRUNED
    full = best.user_attrs["values"]
    assert len(full) == 4
    run = [best_accuracy(folder) for folder in sorted(Path("sweep/1").iterdir())]
    assert run == worse.user_attrs["values"] and len(run) < 4
    tested = [is_worse(run[:count], full[:count], maximise=True) for count in range(1, len(run) + 1)]
    assert tested == [False] * (len(run) - 1) + [True]
    assert worse.intermediate_values == {len(run): pytest.approx(sum(run) / len(run))}
    assert [(row["seeds"], row["last_step"]) for row in table()] == [("4", ""), (str(len(run)), "")]


def test_without_optuna_it_says_how_to_install_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    Plugins.instance()  # which runs the module once more when it is first asked for
    monkeypatch.setattr(sweeper, "_SEARCH", "missing_engine")
    code, error = search(command, LR, *settings(num_trials=2))
    assert code == 1 and error.count("\n") == 1
    assert (
        "needs the package 'missing_engine': it is not installed. Install it by `pip install 'hypertorch[search]'`"
        in error
    )


def test_no_start_of_hydra_imports_an_engine() -> None:
    """Hydra imports the plug-in at each start of every command."""
    code = (
        "import sys; sys.modules['torch'] = None; import hydra_plugins.hypertorch_search.config, "
        "hydra_plugins.hypertorch_search.sweeper; "
        "assert not {'optuna', 'scipy', 'sqlalchemy', 'matplotlib', 'hypertorch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=TRAIN.parents[1], check=True)
