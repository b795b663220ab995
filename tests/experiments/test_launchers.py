"""Sweeps beside each other: the commands of the documentation compose, and a launcher runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import experiments.common.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.common.config_errors import CONFIGS
from tests.experiments.commands import TINY
from tests.helpers import pages

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/several-processes.md"


def composed(words: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [word for word in words if not word.startswith("--")], return_hydra_config=True)


def shown(word: str) -> list[list[str]]:
    """The commands of the page that have a word, without the program."""
    return [words[1:] for words in pages.commands(PAGE) if word in words]


def test_the_command_for_slurm_composes() -> None:
    [words] = shown("hydra/launcher=submitit_slurm")
    launcher = composed([word for word in words if not word.startswith("seed=")]).hydra.launcher
    assert launcher._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    asked = ("partition", "timeout_min", "cpus_per_task", "gres", "mem_gb", "array_parallelism")
    assert [launcher[name] for name in asked] == ["gpu", 240, 4, "gpu:1", 16, 8]


def test_the_command_for_joblib_composes() -> None:
    [words] = shown("hydra/launcher=joblib")
    launcher = composed([word for word in words if not word.startswith("seed=")]).hydra.launcher
    assert (launcher._target_.rpartition(".")[2], launcher.n_jobs) == ("JoblibLauncher", 4)


def test_commands_under_torchrun_compose() -> None:
    commands = shown("experiments/train.py")
    assert len(commands) >= 4
    for words in commands:
        assert composed(words[words.index("experiments/train.py") + 1 :]).task_name == "train"


@pytest.mark.slow
def test_jobs_of_submitit_are_runs(tmp_path: Path) -> None:
    """The executor that starts processes on this machine; that of SLURM differs in how it asks for them."""
    words = ("--multirun", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "seed=0,1", "threads=1")
    result = subprocess.run(
        [sys.executable, str(ROOT / "experiments/train.py"), *words, *TINY, f"paths.sweep_dir={tmp_path}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads((tmp_path / str(job) / "results.json").read_text()) for job in range(2)]
    assert [one["seed"] for one in found] == [0, 1]
    assert found[0]["metrics"] != found[1]["metrics"]
