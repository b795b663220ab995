"""Judges a run's best outer variables again: on another split, on more episodes, or on others.

python experiments/evaluate.py run=outputs/train/runs/2026-01-31_12-00-00 num_episodes=2000
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import (
    device,
    optional,
    package_names,
    seed_number,
    switch,
    text,
    whole_number,
)
from experiments.common.configuration.reads import Reads, check_settings_are_read
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.results.reporting import (
    check_figures,
    duration,
    peak_memory_mib,
    print_reports,
    report_as_dict,
    versions,
    write_results,
)
from experiments.common.runs.experiment import build_experiment, check_repetitions
from experiments.common.runs.run_folder import RunFolder, command, open_folder, read_config
from hypertorch.types import TensorDict

MAIN_CONFIG = CONFIGS / "evaluate.yaml"
failures = Failures(MAIN_CONFIG)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What the command reads.

    Args:
        run: the run's folder.
        trust: packages whose classes the run's configuration may name.
        split: what to judge on; None for the experiment's last.
        num_episodes: how many; None for as many as the run's own evaluation.
        num_queries: queries per class; None for as many as the run has.
        seed: chooses the episodes; None for those of the run's own evaluation.
        dataset_root: where the data is now; None for where it was.
        device: where to compute.
        resume: nothing is resumed.
    """

    run: str = setting(text)
    trust: list[str] = setting(package_names)
    split: str | None = setting(optional(text))
    num_episodes: int | None = setting(
        optional(partial(whole_number, minimum=1, purpose="the evaluation is a mean over episodes"))
    )
    num_queries: int | None = setting(
        optional(partial(whole_number, minimum=1, purpose="it is the number of images that each class is judged on"))
    )
    seed: int | None = setting(optional(partial(seed_number, purpose="it chooses the episodes")))
    dataset_root: str | None = setting(optional(text))
    device: torch.device = setting(device)
    resume: bool = setting(switch)


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> float:
    """Returns the main figure."""
    check_settings_are_read(config, Reads(settings=(EvaluateSettings,)))
    own = parse(EvaluateSettings, config)
    run = RunFolder(Path(own.run))
    trained_as = as_trained(own, run, device_name=config.device)
    settings = parse(TrainSettings, trained_as)
    hparams = load_best(run, own.device)
    folder = open_folder(config, HydraConfig.get().overrides.task)
    experiment = build_experiment(trained_as, settings)
    split = experiment.splits[-1] if own.split is None else own.split
    if split not in experiment.splits:
        raise ExpectedFailure(
            f"`split` is {split!r}, which is not among the choices. Use one of: {', '.join(experiment.splits)}."
        )
    num_episodes = settings.evaluation.num_episodes if own.num_episodes is None else own.num_episodes
    source = experiment.evaluation(split, seed=own.seed)
    check_repetitions(source, num_episodes, "num_episodes")
    check_variables(hparams, source.init_hparams(), run)
    execution = settings.execution.of(source)
    report = ht.evaluate(source, hparams, num_episodes=num_episodes, progress=True, execution=execution)
    check_figures({split: report}, f"the best outer variables of {str(run.path)!r}")
    if experiment.metric not in report.metrics:
        raise ExpectedFailure(
            f"the metric of the run is {experiment.metric!r}, which its problems do not report; they report "
            f"{', '.join(report.metrics)}. Restore the file, or use another run."
        )
    write_results(
        folder.results,
        {
            "command": command("python experiments/evaluate.py", HydraConfig.get().overrides.task),
            "run": str(run.path),
            "metrics": {split: report_as_dict(report)},
            "evaluation_minutes": report.seconds / 60,
            "peak_memory_mib": peak_memory_mib(own.device),
            "device": str(own.device),
            "versions": versions(),
        },
    )
    console = Console()
    print_reports(console, f"best outer variables of {run.path}", {split: report})
    console.print(f"{duration(report.seconds)}; in {folder.results}", highlight=False, soft_wrap=True)
    return report.metrics[experiment.metric].mean


def check_variables(found: TensorDict, expected: TensorDict, run: RunFolder) -> None:
    """Refuses outer variables that are not those of the experiment.

    Args:
        found: those of the run.
        expected: those that the experiment starts from.
        run: the folder of the run.

    Raises:
        ExpectedFailure: naming those that differ in name or shape.
    """
    shapes, wanted = (
        {name: tuple(value.shape) for name, value in own.items()} for own in (found, expected)
    )  # fmt: skip
    if shapes != wanted:
        differing = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        raise ExpectedFailure(
            f"`run` is {str(run.path)!r}, whose outer variables are not those of its experiment: {differing} have the "
            f"shapes {[shapes.get(name, 'absent') for name in differing]} instead of "
            f"{[wanted.get(name, 'absent') for name in differing]}. Its files do not belong together: restore them, or "
            "use another run."
        )


def as_trained(own: EvaluateSettings, run: RunFolder, *, device_name: str) -> DictConfig:
    """Returns the run's configuration with the device, the number of queries and the data's place of this command.

    Args:
        own: the settings of this command.
        run: the run's folder.
        device_name: where to compute, as the configuration spells it.

    Raises:
        ExpectedFailure: if the folder is not that of a training run, or a setting has no effect on its experiment.
    """
    trained_as = read_config(run.path, trusted=own.trust)
    if "experiment" not in trained_as:
        raise ExpectedFailure(
            f"`run` is {str(run.path)!r}, whose configuration has no `experiment`: it is not the folder of a "
            "training run. Name a folder that experiments/train.py wrote."
        )
    trained_as.device = device_name
    if own.num_queries is not None:
        if OmegaConf.select(trained_as, "evaluation.num_queries") is None:
            raise ExpectedFailure(
                f"`num_queries` is {own.num_queries}, but the run's experiment has no queries: it would have no "
                "effect. Leave it out."
            )
        trained_as.evaluation.num_queries = own.num_queries
    if own.dataset_root is not None:
        if trained_as.get("dataset") is None or "root" not in trained_as.dataset:
            raise ExpectedFailure(
                f"`dataset_root` is {own.dataset_root!r}, but the run's data comes from no folder: it would have no "
                "effect. Leave it out."
            )
        trained_as.dataset.root = own.dataset_root
    return trained_as


def load_best(run: RunFolder, device: torch.device) -> TensorDict:
    """Returns the run's best outer variables, those so far if it has not ended."""
    newest = ht.Checkpoints(run.checkpoints).newest()
    if not run.hparams.is_file() and newest is not None:
        Console(stderr=True).print(f"the run has not ended; evaluating {newest.name}", highlight=False)
        return ht.load_hparams(newest, device=device)
    return ht.load_hparams(run.hparams, device=device)


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
