"""Trains a few-shot learner as configured, evaluates it on unseen classes, and writes both into a folder.

scripts/train experiment=maml dataset=omniglot seed=1
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

import experiments.common.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.adaptation_pictures import draw_adaptation
from experiments.assembly import (
    TRAINING,
    EpisodeStreams,
    build_learner,
    build_outer_loop,
    build_training_learner,
    check_same_hparams,
    on_episodes,
)
from experiments.common.config_errors import CONFIGS
from experiments.common.failures import ExpectedFailure, Failures
from experiments.common.reads import check_settings_are_read
from experiments.common.reporting import (
    check_figures,
    duration,
    hardware,
    peak_memory_mib,
    print_reports,
    report_as_dict,
    versions,
    write_results,
)
from experiments.common.run_folder import RunFolder, command, current_folder, open_folder, read_config
from experiments.common.settings import (
    check_training_settings,
    chosen_device,
    chosen_dtype,
    chosen_splits,
    set_threads,
    trusted_packages,
)
from experiments.episode_pictures import draw_episodes
from experiments.plots import plot_learning_curve, plot_step_sizes
from hypertorch.errors import CheckpointError
from hypertorch.fewshot import Learner
from hypertorch.types import TensorDict

MAIN_CONFIG = CONFIGS / "train.yaml"
failures = Failures(MAIN_CONFIG)


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> float:
    """Returns the figure that a sweep optimises: the best validation."""
    check_settings_are_read(config, TRAINING)
    check_training_settings(config)
    set_threads(config)
    initial = start(config)
    # All of it before the folder becomes a run: a mistake must not leave one behind.
    streams = EpisodeStreams(config=config)
    training, validation = streams.training(), streams.validation()
    learner, trainee = build_learner(config), build_training_learner(config)
    check_same_hparams(trainee, learner)
    source = on_episodes(config, trainee, training)
    loop = build_outer_loop(config, source, on_episodes(config, learner, validation), current_folder())
    folder = open_folder(config, HydraConfig.get().overrides.task)
    console = Console(stderr=True)
    console.print(f"{'resuming' if folder.resumed else 'run'} in {folder.path}", highlight=False, soft_wrap=True)
    trained = loop.run(config.outer_loop.num_outer_steps, start_from=initial, resume=folder.resumed)
    reports = evaluate_splits(config, learner, streams, trained)
    check_figures(reports, f"the best outer variables of {trained.num_outer_steps} outer steps")
    write_results(folder.results, results(config, trained, reports))
    draw(config, learner, streams, trained, folder)
    show(config, trained, reports, folder)
    return merit(config, trained, reports)


def merit(config: DictConfig, trained: ht.Trained, reports: dict[str, ht.Report]) -> float:
    """Returns what a sweep optimises: the best validation, else the evaluation on meta_val, else the first there is."""
    if trained.best_value is not None:
        return trained.best_value
    return reports.get("meta_val", next(iter(reports.values()))).metrics[config.task.metric].mean


def start(config: DictConfig) -> TensorDict | None:
    """Returns the outer variables to start from; None for fresh ones."""
    path = config.start_from
    trusted = trusted_packages(config)
    if path is None:
        if trusted:
            raise ExpectedFailure(
                f"`trust` is {trusted}, but this run takes nothing from another run's folder (`start_from` is null): "
                "nothing would come of it. Your own classes need no trust on the command line. Leave it out."
            )
        return None
    run = RunFolder(Path(str(path)))
    if run.config.exists():
        # Only numbers are taken from there, but whose folder asks for foreign code is not trusted with these either.
        read_config(run.path, setting="start_from", trusted=trusted)
    try:
        hparams = ht.load_hparams(str(path), device=chosen_device(config))
    except CheckpointError as error:
        raise ExpectedFailure(f"`start_from` is {str(path)!r}, but no run can start there. {error}") from error
    return {name: value.to(chosen_dtype(config)) for name, value in hparams.items()}


def evaluate_splits(
    config: DictConfig, learner: Learner, streams: EpisodeStreams, trained: ht.Trained
) -> dict[str, ht.Report]:
    """Returns the figures of the best outer variables on fresh episodes of each split that is asked for."""
    return {
        split: ht.evaluate(
            on_episodes(config, learner, streams.evaluation(split)),
            trained.best_hparams,
            num_episodes=config.evaluation.num_episodes,
            progress=config.outer_loop.progress,
        )
        for split in chosen_splits(config)
    }


def results(config: DictConfig, trained: ht.Trained, reports: dict[str, ht.Report]) -> dict[str, object]:
    """Returns the contents of results.json."""
    return {
        "command": command("scripts/train", HydraConfig.get().overrides.task),
        "metrics": {split: report_as_dict(report) for split, report in reports.items()},
        "seed": config.seed,
        "num_outer_steps": trained.num_outer_steps,
        "best_step": trained.best_step,
        "training_minutes": trained.seconds / 60,
        "evaluation_minutes": sum(report.seconds for report in reports.values()) / 60,
        "peak_memory_mib": peak_memory_mib(chosen_device(config)),
        "device": str(chosen_device(config)),
        "hardware": hardware(chosen_device(config)),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def draw(config: DictConfig, learner: Learner, streams: EpisodeStreams, trained: ht.Trained, folder: RunFolder) -> None:
    """Writes the pictures."""
    plot_learning_curve(folder.metrics, folder.path / "learning_curve.png", config.task.metric)
    plot_step_sizes(trained.best_hparams, folder.path / "step_sizes.png")
    shown = chosen_splits(config)[-1]
    draw_episodes(config, learner, streams.evaluation(shown), trained.best_hparams, folder.path / "episodes.png")
    draw_adaptation(
        learner,
        trained.best_hparams,
        {split: streams.evaluation(split) for split in ("meta_train", "meta_val")},
        on=lambda episodes: on_episodes(config, learner, episodes),
        metric=config.task.metric,
        num_episodes=config.pictures.num_episodes,
        path=folder.path / "adaptation.png",
    )


def show(config: DictConfig, trained: ht.Trained, reports: dict[str, ht.Report], folder: RunFolder) -> None:
    """Prints the closing table."""
    console = Console()
    print_reports(console, f"after {trained.best_step} outer steps (best validation)", reports)
    memory = peak_memory_mib(chosen_device(config))
    console.print(
        f"training {duration(trained.seconds)} ({trained.num_outer_steps} outer steps), evaluation "
        f"{duration(sum(report.seconds for report in reports.values()))}, peak memory "
        f"{'unknown' if memory is None else f'{memory:.0f} MiB'}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"everything is in {folder.path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    # Schedulers of clusters ask with this signal; leaving by an exception writes a checkpoint first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(failures.exit_code(main))
