"""Searches that are refused before their first trial."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.commands import Command
from tests.experiments.search.searches import LR, SMALL, search, settings

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "misspelt setting": (("outer_optimzer.lr=interval(0,1)", "hydra.sweeper.num_trials=2"), "outer_optimzer.lr"),
    "misspelt setting of the search": ((LR, "hydra.sweeper.num_trails=2"), "`hydra.sweeper.num_trails` is no setting"),
    "nothing to search": (("hydra.sweeper.num_trials=2",), "there is nothing to search"),
    "no number": ((LR,), "`hydra.sweeper.num_trials` is not given"),
    "an interval for the grid": ((LR, *settings(sampler="grid")), "`outer_optimizer.lr` is an interval"),
    "a number for the grid": (("seed=0,1", *settings(sampler="grid", num_trials=2)), "grid runs every point once"),
    "unknown sampler": ((LR, *settings(sampler="tep", num_trials=2)), "Use one of: random, grid, qmc, tpe"),
    "unknown argument of the sampler": (
        (LR, *settings(num_trials=2, settings="{n_starts:2}")),
        "which the sampler tpe refuses",
    ),
    "end of a range": (("outer_optimizer.lr=interval(-1,1)", *settings(num_trials=2)), "Invalid learning rate: -1"),
    "one choice": (("outer_optimizer.lr=1,fast", *settings(num_trials=2)), "fast"),
    "empty interval": (("outer_optimizer.lr=interval(2,1)", *settings(num_trials=2)), "is no interval"),
    "choices for numbers": (("seed=0,1", LR, *settings(sampler="cmaes", num_trials=2)), "`seed` is a choice"),
    "one number for a covariance": ((LR, *settings(sampler="cmaes", num_trials=2)), "alone is searched"),
    "whole numbers for small moves": (
        ("experiment.hidden=int(interval(3,9))", LR, *settings(sampler="observer", num_trials=2)),
        "`experiment.hidden` takes whole numbers",
    ),
    "several objectives for small moves": (
        (LR, *settings(sampler="observer", num_trials=2, objectives="[validation,seconds]")),
        "`hydra.sweeper.sampler` is 'observer', which goes by one number",
    ),
    "a move beyond the range": (
        (LR, *settings(sampler="observer", num_trials=2, settings="{trusted_move:3}")),
        "`trusted_move` is 3",
    ),
    "a start that is not searched": (
        (LR, *settings(num_trials=2, starts="[{outer_optimizer.momentum:0.1}]")),
        "`hydra.sweeper.starts` names 'outer_optimizer.momentum', which is not searched",
    ),
    "a start outside": ((LR, *settings(num_trials=2, starts="[{outer_optimizer.lr:1e9}]")), "for `outer_optimizer.lr`"),
    "a start that is no table": ((LR, *settings(num_trials=2, starts="[3]")), "has the entry 3, which is no table"),
    "starts that are no list": ((LR, *settings(num_trials=2, starts="3")), "`hydra.sweeper.starts` is 3, but it is a"),
    "more starts than trials": (
        (LR, *settings(num_trials=1, starts="[{outer_optimizer.lr:1},{outer_optimizer.lr:2}]")),
        "has 2 points, more than",
    ),
    "starts of a grid": (
        ("seed=0,1", *settings(sampler="grid", starts="[{seed:1}]")),
        "grid runs every point",
    ),
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
    "two kinds of seeds": (
        ("seed=0,1", *settings(sampler="grid", seeds=2)),
        "`seed` has several values, and `hydra.sweeper.seeds` is 2, which counts up from each",
    ),
    "two kinds of seeds in a race": (
        ("seed=range(0,2)", LR, *settings(num_trials=2, seeds=2, racing="true")),
        "trials would be compared over different seeds. Give seed one value, or leave",
    ),
    "how often is validated": (
        ("validation.every=1,2", *settings(sampler="grid")),
        "`validation.every` has several values, but trials are compared by their validation: a trial with more",
    ),
    "on how much is validated": (
        ("++validation.num_episodes=1,2", *settings(sampler="grid")),
        "`validation.num_episodes` has several values, but trials are compared by their validation",
    ),
    "storage": ((LR, *settings(num_trials=2, storage="nonsense://a")), "`hydra.sweeper.storage` is 'nonsense://a'"),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_before_the_first_trial(case: str, command: Command, tmp_path: Path) -> None:
    words, expected = REFUSED[case]
    code, error = search(command, *words)
    assert code == 1
    assert expected in error and error.count("\n") == 1, error
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_experiments_with_other_directions_are_no_one_search(command: Command) -> None:
    words = ("experiment=noisy_digits,data_cleaning", "debug=default", *settings(num_trials=2))
    code, error = command("--multirun", "hydra/sweeper=search", *words)
    assert code == 1 and "which is better ('max',) with experiment=noisy_digits and ('min',) with" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("experiment=rotation,noisy_digits", "debug=default"), "`experiment` has several values"),
        (("experiment=protonet", "debug=default,fewshot"), "`debug` has several values"),
        (("experiment=protonet", "debug=fewshot", "episodes.way=2,3"), "`episodes.way` has several values"),
    ],
)
def test_what_decides_on_what_is_validated_is_not_searched(
    words: tuple[str, ...], expected: str, command: Command
) -> None:
    code, error = command("--multirun", "hydra/sweeper=search", *words, "hydra.sweeper.sampler=grid")
    assert code == 1 and f"{expected}, but trials are compared by their validation" in error and "Give it one" in error


@pytest.mark.slow
def test_experiments_that_cannot_go_on_are_refused(command: Command) -> None:
    halving = settings(pruner="successive_halving", num_trials=2, min_steps=1, eta=2)
    code, error = command("--multirun", "hydra/sweeper=search", "experiment=sinusoid", "debug=fewshot", LR, *halving)
    assert code == 1 and "`execution.tasks` is 'auto', which is measured" in error
    code, error = command("--multirun", "hydra/sweeper=search", "experiment=real_time", "debug=default", LR, *halving)
    assert code == 1 and "`experiment.num_updates` depends on `outer_loop.num_outer_steps`" in error


def test_a_schedule_length_without_a_schedule_is_refused(command: Command) -> None:
    code, error = command(*SMALL, "outer_loop.scheduler=null", "outer_loop.schedule_length=9")
    assert code == 1 and "`outer_loop.schedule_length` is given, but the run has no learning-rate schedule" in error
