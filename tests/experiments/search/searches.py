"""Searches through the real command on a small experiment, and what they leave in their folders."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

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


def best_accuracy(folder: str | Path) -> float:
    return max(record.get("validation/accuracy", 0.0) for record in records(folder))


def steps_run(folders: Sequence[Path]) -> int:
    """The outer steps whose record was written, each counted as often as it was taken."""
    return sum("hypergradient_norm" in record for folder in folders for record in records(folder))


def table() -> list[dict[str, str]]:
    with Path("sweep/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def printed_commands(out: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in out.splitlines() if line.strip().startswith("scripts/train")]
