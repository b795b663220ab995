"""Runs an experiment: learns its outer variables, judges them, and writes all of it into a folder.

scripts/train experiment=maml dataset=omniglot seed=1
scripts/train experiment=noisy_digits
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.commands.processes import cpu_seconds_of_others, is_first_process
from experiments.common.configuration.readers import device
from experiments.common.configuration.reads import check_settings_are_read
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.results.learning_curve import plot_learning_curve
from experiments.common.results.reporting import (
    check_figures,
    duration,
    hardware,
    peak_memory_mib,
    print_reports,
    report_as_dict,
    versions,
    write_results,
)
from experiments.common.runs.experiment import Experiment, build_experiment, check_repetitions, experiment_class
from experiments.common.runs.run_folder import RunFolder, command, current_folder, open_folder, read_config
from experiments.common.runs.training import TRAINING, build_outer_loop
from experiments.common.runs.trials import SearchedTraining, objectives_of_trial, values_of_trial
from hypertorch.errors import CheckpointError
from hypertorch.inner.ranks import number_of_processes
from hypertorch.outer.storage.one_writer import one_writer
from hypertorch.search import searchable
from hypertorch.types import TensorDict

MAIN_CONFIG = CONFIGS / "train.yaml"
failures = Failures(MAIN_CONFIG, is_shared=True)
Reports = dict[str, ht.Report]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a run needs before its first step.

    Args:
        settings: the plain settings.
        experiment: what is learnt from, validated on and judged on.
        splits: what it is judged on.
        loop: the outer loop.
        initial: outer variables to start from; None for fresh ones.
        ranks: the processes that share the run; None for this one alone.
    """

    settings: TrainSettings
    experiment: Experiment
    splits: tuple[str, ...]
    loop: ht.OuterLoop
    initial: TensorDict | None
    ranks: ht.Ranks | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.ranks is None or self.ranks.is_first


def prepare(config: DictConfig, ranks: ht.Ranks | None = None) -> Prepared:
    """Returns all of it before the folder becomes a run: a mistake must not leave one behind.

    Raises:
        ExpectedFailure: naming the setting that the run cannot work with.
    """
    check_settings_are_read(config, TRAINING | experiment_class(config).READS)
    settings = parse(TrainSettings, config)
    settings.set_threads()
    initial = start(settings)
    experiment = build_experiment(config, settings)
    experiment.check_training(settings)
    splits = experiment.evaluated_splits(settings.evaluation.splits)
    loop = build_outer_loop(config, settings, experiment, current_folder(), ranks)
    return Prepared(settings=settings, experiment=experiment, splits=splits, loop=loop, initial=initial, ranks=ranks)


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@searchable(SearchedTraining(lambda config: prepare(config).experiment))
@failures.reported
def main(config: DictConfig) -> float | list[float]:
    """Returns the figure that a sweep optimises: the best validation, or all that a search asks for."""
    if not is_first_process():
        # The first process says it.
        warnings.simplefilter("ignore")
    with ht.join_ranks(device=device(config, "device")) as ranks:
        prepared = prepare(config, ranks)
        with one_writer(current_folder().path):
            return carry_out(config, prepared)


def carry_out(config: DictConfig, prepared: Prepared) -> float | list[float]:
    """Returns what `main` returns, with everything of the run written into its folder."""
    settings, experiment, splits = prepared.settings, prepared.experiment, prepared.splits
    ranks = prepared.ranks
    folder = open_folder(config, HydraConfig.get().overrides.task) if prepared.is_first else current_folder()
    console = Console(stderr=True, quiet=not prepared.is_first)
    console.print(f"{'resuming' if folder.resumed else 'run'} in {folder.path}", highlight=False, soft_wrap=True)
    start_cpu = process_time()
    trained = prepared.loop.run(settings.outer_loop.num_outer_steps, start_from=prepared.initial, resume=folder.resumed)
    objectives = objectives_of_trial()
    if objectives is not None:  # which is compared by its validation, and not judged
        return values_of_trial(objectives, trained, process_time() - start_cpu)
    experiment = experiment.after(trained)
    elsewhere = cpu_seconds_of_others(ranks)
    if not folder.resumed:
        experiment.training_cpu_seconds = process_time() - start_cpu + elsewhere
    reports = evaluate_splits(experiment, settings, splits, trained.best_hparams, ranks)
    check_figures(reports, f"the best outer variables of {trained.num_outer_steps} outer steps")
    elsewhere = cpu_seconds_of_others(ranks)
    if not prepared.is_first:
        return merit(experiment, trained, reports)
    # On this process alone: a baseline that is given as much time as the training is another on each.
    baselines = evaluate_baselines(experiment, settings, splits)
    # Only of these processes: what a run took before it was interrupted is not known.
    cpu_seconds = None if folder.resumed else process_time() + elsewhere
    write_results(folder.results, results(settings, trained, reports, baselines, cpu_seconds))
    plot_learning_curve(folder.metrics, folder.path / "learning_curve.png", experiment.metric)
    experiment.draw(trained.best_hparams, folder.path)
    show(settings, trained, reports, baselines, experiment.published, cpu_seconds, folder)
    return merit(experiment, trained, reports)


def merit(experiment: Experiment, trained: ht.Trained, reports: Reports) -> float:
    """Returns what a sweep optimises: the best validation, else the evaluation, on the split before the test if any."""
    if trained.best_value is not None:
        return trained.best_value
    chosen = [split for split in experiment.splits[:-1] if split in reports][-1:]
    return reports[chosen[0] if chosen else next(iter(reports))].metrics[experiment.metric].mean


def start(settings: TrainSettings) -> TensorDict | None:
    """Returns the outer variables to start from; None for fresh ones."""
    path, trusted = settings.start_from, settings.trust
    if path is None:
        if trusted:
            raise ExpectedFailure(
                f"`trust` is {trusted}, but this run takes nothing from another run's folder (`start_from` is null): "
                "it would do nothing. Your own classes need no trust on the command line. Leave it out."
            )
        return None
    run = RunFolder(Path(path))
    if run.config.exists():
        # Only numbers are taken from there, but whose folder asks for foreign code is not trusted with these either.
        read_config(run.path, setting="start_from", trusted=trusted)
    try:
        hparams = ht.load_hparams(path, device=settings.device)
    except CheckpointError as error:
        raise ExpectedFailure(f"`start_from` is {path!r}, but no run can start there. {error}") from error
    return {name: value.to(settings.dtype) for name, value in hparams.items()}


def evaluate_splits(
    experiment: Experiment,
    settings: TrainSettings,
    splits: Sequence[str],
    hparams: TensorDict,
    ranks: ht.Ranks | None = None,
) -> Reports:
    """Returns the figures of outer variables on each split that is asked for."""
    return {split: _judged(experiment.evaluation(split), hparams, settings, ranks) for split in splits}


def evaluate_baselines(experiment: Experiment, settings: TrainSettings, splits: Sequence[str]) -> dict[str, Reports]:
    """Returns the figures that those of the experiment are compared with, by name and split."""
    found: dict[str, Reports] = {}
    for split in splits:
        for name, baseline in experiment.baselines(split).items():
            found.setdefault(name, {})[split] = _judged(baseline.source, baseline.hparams, settings)
    return found


def _judged(
    source: ht.ProblemSource, hparams: TensorDict, settings: TrainSettings, ranks: ht.Ranks | None = None
) -> ht.Report:
    num_episodes = settings.evaluation.num_episodes
    check_repetitions(source, num_episodes, "evaluation.num_episodes")
    return ht.evaluate(
        source,
        hparams,
        num_episodes=num_episodes,
        progress=settings.outer_loop.progress and (ranks is None or ranks.is_first),
        execution=replace(settings.execution.of(source), ranks=ranks),
    )


def results(
    settings: TrainSettings,
    trained: ht.Trained,
    reports: Reports,
    baselines: dict[str, Reports],
    cpu_seconds: float | None,
) -> dict[str, object]:
    """Returns the contents of results.json."""
    return {
        "command": command("scripts/train", HydraConfig.get().overrides.task),
        "metrics": {split: report_as_dict(report) for split, report in reports.items()},
        "baselines": {
            name: {split: report_as_dict(report) for split, report in judged.items()}
            for name, judged in baselines.items()
        },
        "seed": settings.seed,
        "num_outer_steps": trained.num_outer_steps,
        "best_step": trained.best_step,
        "training_minutes": trained.seconds / 60,
        "cpu_seconds": cpu_seconds,
        "evaluation_minutes": sum(report.seconds for report in reports.values()) / 60,
        "peak_memory_mib": peak_memory_mib(settings.device),
        "device": str(settings.device),
        "hardware": hardware(settings.device),
        "torch_threads": torch.get_num_threads(),
        "processes": number_of_processes(),
        "versions": versions(),
    }


def show(
    settings: TrainSettings,
    trained: ht.Trained,
    reports: Reports,
    baselines: dict[str, Reports],
    published: Mapping[str, str],
    cpu_seconds: float | None,
    folder: RunFolder,
) -> None:
    """Prints the closing table, and how to load the outcome."""
    console = Console()
    rows = dict(reports)
    for name, judged in baselines.items():
        rows |= {f"{split}, {name}": report for split, report in judged.items()}
    print_reports(console, f"after {trained.best_step} outer steps (best validation)", rows)
    memory = peak_memory_mib(settings.device)
    spent = "unknown CPU seconds (a resumed run)" if cpu_seconds is None else f"{cpu_seconds:.0f} CPU seconds in all"
    for line in (
        *(f"published, {what}: {figure}" for what, figure in published.items()),
        f"training {duration(trained.seconds)} ({trained.num_outer_steps} outer steps), evaluation "
        f"{duration(sum(report.seconds for report in reports.values()))}, peak memory "
        f"{'unknown' if memory is None else f'{memory:.0f} MiB'}, {spent}",
        f"everything is in {folder.path}",
        f"hypertorch.load_hparams({str(folder.path)!r}) loads the outer variables",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    # Schedulers of clusters ask with this signal; leaving by an exception writes a checkpoint first. Other processes
    # than the first write none, and end at once, even while they wait.
    if is_first_process():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(failures.exit_code(main))
