"""Evaluates a run's best outer variables on a split of its classes.

python experiments/evaluate.py run=outputs/train/runs/2026-01-31_12-00-00 num_episodes=2000
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

import experiments.common.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.assembly import EpisodeStreams, build_learner, on_episodes
from experiments.common.config_errors import CONFIGS
from experiments.common.failures import ExpectedFailure, Failures
from experiments.common.reads import Reads, check_settings_are_read
from experiments.common.reporting import (
    check_figures,
    duration,
    peak_memory_mib,
    print_reports,
    report_as_dict,
    versions,
    write_results,
)
from experiments.common.run_folder import RunFolder, command, open_folder, read_config
from experiments.common.settings import SPLITS, chosen_device, one_of, trusted_packages, whole_number

MAIN_CONFIG = CONFIGS / "evaluate.yaml"
failures = Failures(MAIN_CONFIG)
_NEEDED = ("dataset", "episodes", "backbone", "learner", "task", "training", "evaluation", "seed", "dtype")


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> float:
    """Returns the main figure."""
    check_settings_are_read(config, Reads(main_config=MAIN_CONFIG))
    split = one_of(config, "split", SPLITS)
    num_episodes = whole_number(config, "num_episodes", minimum=1, purpose="the evaluation is a mean over episodes")
    if config.seed is not None:
        whole_number(config, "seed", minimum=0, purpose="it chooses the episodes")
    if config.num_queries is not None:
        whole_number(config, "num_queries", minimum=1, purpose="each class is judged on so many images")
    chosen_device(config)
    run = RunFolder(Path(str(config.run)))
    trained_as = as_trained(config, run)
    hparams = load_best(run, config)
    folder = open_folder(config, HydraConfig.get().overrides.task)
    learner, streams = build_learner(trained_as), EpisodeStreams(config=trained_as)
    report = ht.evaluate(
        on_episodes(trained_as, learner, streams.evaluation(split, config.seed)),
        hparams,
        num_episodes=num_episodes,
        progress=True,
    )
    check_figures({split: report}, f"the best outer variables of {str(run.path)!r}")
    if trained_as.task.metric not in report.metrics:
        raise ExpectedFailure(
            f"`task.metric` of the run is {trained_as.task.metric!r}, which its episodes do not report; "
            f"they report {', '.join(report.metrics)}. Restore the file, or use another run."
        )
    write_results(
        folder.results,
        {
            "command": command("python experiments/evaluate.py", HydraConfig.get().overrides.task),
            "run": str(run.path),
            "metrics": {split: report_as_dict(report)},
            "evaluation_minutes": report.seconds / 60,
            "peak_memory_mib": peak_memory_mib(chosen_device(config)),
            "device": str(chosen_device(config)),
            "versions": versions(),
        },
    )
    console = Console()
    print_reports(console, f"best outer variables of {run.path}", {split: report})
    console.print(f"{duration(report.seconds)}; in {folder.results}", highlight=False, soft_wrap=True)
    return report.metrics[trained_as.task.metric].mean


def as_trained(config: DictConfig, run: RunFolder) -> DictConfig:
    """Returns the run's configuration with the device, the number of queries and the data's place of this command."""
    trained_as = read_config(run.path, trusted=trusted_packages(config))
    missing = [name for name in _NEEDED if name not in trained_as]
    if missing:
        raise ExpectedFailure(
            f"`run` is {str(run.path)!r}, whose configuration has no `{missing[0]}`: it is not the folder of a "
            "training run. Name a folder that experiments/train.py wrote."
        )
    trained_as.device = config.device
    if config.num_queries is not None:
        trained_as.evaluation.num_queries = config.num_queries
    if config.dataset_root is not None:
        if trained_as.dataset is None or "root" not in trained_as.dataset:
            raise ExpectedFailure(
                f"`dataset_root` is {config.dataset_root!r}, but the run's data comes from no folder: it would have no "
                "effect. Leave it out."
            )
        trained_as.dataset.root = config.dataset_root
    return trained_as


def load_best(run: RunFolder, config: DictConfig) -> dict[str, Tensor]:
    """Returns the run's best outer variables, those so far if it has not ended."""
    device = chosen_device(config)
    newest = ht.Checkpoints(run.checkpoints).newest()
    if not run.hparams.is_file() and newest is not None:
        Console(stderr=True).print(f"the run has not ended; evaluating {newest.name}", highlight=False)
        return ht.load_hparams(newest, device=device)
    return ht.load_hparams(run.hparams, device=device)


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
