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

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.common.commands.config_errors import CONFIGS
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


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments/train.py"), "--multirun", *words, *TINY, f"paths.sweep_dir={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


SUBMITIT = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "threads=1")


@pytest.mark.slow
def test_jobs_of_submitit_are_runs(tmp_path: Path) -> None:
    """The executor that starts processes on this machine; that of SLURM differs in how it asks for them."""
    result = run(tmp_path, *SUBMITIT, "seed=0,1")
    assert result.returncode == 0, result.stderr
    found = [json.loads((tmp_path / str(job) / "results.json").read_text()) for job in range(2)]
    assert [one["seed"] for one in found] == [0, 1]
    assert found[0]["metrics"] != found[1]["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [SUBMITIT, ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "threads=1")])
def test_a_failed_job_in_another_process_fails_the_command(launcher: tuple[str, ...], tmp_path: Path) -> None:
    result = run(tmp_path, *launcher, "episodes.way=500,5")
    assert result.returncode == 1
    assert "error: job 0 (" in result.stderr and "`way` is 500" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "1" / "results.json").exists()
