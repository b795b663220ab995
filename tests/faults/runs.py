"""The runs that are killed: each begins in a folder, or goes on there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hypertorch as ht
from experiments import train
from hypertorch.fewshot import MAML, Regression, Sinusoid
from tests.outer.problems import Quadratics
from tests.outer.runs import full_loop
from tests.outer.test_non_finite_steps import Faulty

NUM_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in a folder.

    Attributes:
        name: for the table.
        go_on: begins it, or resumes it, and returns when it is done.
        is_command: whether it is one of the command line.
    """

    name: str
    go_on: Callable[[Path], None]
    is_command: bool = False


@dataclass(frozen=True, kw_only=True)
class Warm(Quadratics):
    """Quadratics that go on from the last inner state."""

    def at(self, outer_step: int) -> ht.BilevelProblem:
        return replace(super().at(outer_step), warm_start=True, allow_unused=("start",))


def _outer_loop(source: ht.ProblemSource | None = None, **options: Any) -> Callable[[Path], None]:
    def go_on(folder: Path) -> None:
        loop = full_loop(
            folder,
            source,
            checkpoints=ht.Checkpoints(folder / "checkpoints", every=2),
            **{"log_every": 1, **options},
        )
        loop.run(NUM_STEPS, resume=True)

    return go_on


def _few_shot(folder: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    learner = MAML(network, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=2, objective=Regression())
    episodes = Sinusoid(num_tasks=4, shot=5, num_queries=5, dtype=torch.float64)
    _outer_loop(
        learner.on(episodes),
        constraints=None,
        validation=ht.Validation(source=learner.on(episodes), every=8, num_episodes=4, metric="outer_loss", mode="min"),
    )(folder)


def _real_time(folder: Path) -> None:
    problem = replace(Quadratics(num_tasks=None).at(0), allow_unused=("start",))
    ht.RealTime(
        problem,
        optimizer=partial(torch.optim.Adam, lr=0.05),
        every=2,
        log_every=1,
        loggers=[ht.JsonLinesLogger(folder / "metrics.jsonl")],
        checkpoints=ht.Checkpoints(folder / "checkpoints", every=2),
    ).run(2 * NUM_STEPS, resume=True)


_TINY = (
    *("experiment=rotation", "experiment.num_steps=2", "experiment.final_steps=3", "experiment.hidden=4"),
    *("outer_loop.log_every=1", "outer_loop.checkpoints.every=1", "outer_loop.progress=false"),
    *("validation.every=5", "validation.num_episodes=1", "dtype=float64", "threads=1"),
)


def train_words(folder: Path) -> list[str]:
    """What is typed after `experiments/train.py`: the same command again, with `resume=true` where there is a run."""
    resume = ["resume=true"] if (folder / "config.yaml").exists() else []
    return [*_TINY, "outer_loop.num_outer_steps=30", f"paths.run_dir={folder}", *resume]


def _search_words(folder: Path) -> list[str]:
    words = ["--multirun", "hydra/sweeper=search", "hydra.sweeper.sampler=grid", "outer_optimizer.lr=0.5,1.0,2.0"]
    return [*words, *_TINY, "outer_loop.num_outer_steps=10", f"paths.sweep_dir={folder}"]


def _command(words: Callable[[Path], list[str]]) -> Callable[[Path], None]:
    """The command in this process, which has imported it before."""

    def go_on(folder: Path) -> None:
        sys.argv = [train.__file__, *words(folder)]
        code = train.failures.exit_code(train.main)
        if code:
            raise SystemExit(code)

    return go_on


def _started_anew(words: Callable[[Path], list[str]]) -> Callable[[Path], None]:
    """The command in a new interpreter."""

    def go_on(folder: Path) -> None:
        root = Path(train.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, train.__file__, *words(folder)], environment)

    return go_on


LOOPS = {
    run.name: run
    for run in (
        Run(name="`OuterLoop`", go_on=_outer_loop()),
        Run(name="`OuterLoop`, `warm_start`", go_on=_outer_loop(Warm())),
        Run(name="`OuterLoop` over few-shot episodes", go_on=_few_shot),
        Run(name="`RealTime`", go_on=_real_time),
        Run(
            name='`OuterLoop`, `on_non_finite="skip"`',
            go_on=_outer_loop(Faulty(bad=(2, 5, 6, 13, 21, 30, 39)), on_non_finite="skip", most_non_finite=99),
        ),
    )
}
TRAIN, SEARCH = "`experiments/train.py`", "`experiments/train.py --multirun hydra/sweeper=search`"
COMMANDS = {
    run.name: run
    for run in (
        Run(name=TRAIN, go_on=_command(train_words), is_command=True),
        Run(name=SEARCH, go_on=_command(_search_words), is_command=True),
    )
}
ANEW = {
    run.name: run
    for run in (
        Run(name=f"{TRAIN}, a new interpreter", go_on=_started_anew(train_words), is_command=True),
        Run(name=f"{SEARCH}, a new interpreter", go_on=_started_anew(_search_words), is_command=True),
    )
}
