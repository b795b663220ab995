"""Runs every configured backend on one problem at several horizons, and draws error, time and memory.

python experiments/compare_backends.py
python experiments/compare_backends.py 'num_steps=[10,100,1000]' 'only=[reverse,reverse_sqrt,truncated_20]'
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import Failures
from experiments.common.configuration.readers import ascending_lengths, listed_names, whole_number
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.diagnostics.diagnosis import (
    DiagnosisSettings,
    build_backends,
    check_reads,
    run_description,
    training_problem,
)
from experiments.common.diagnostics.diagnosis_plots import plot_comparison
from experiments.common.results.reporting import json_ready, write_csv, write_results
from experiments.common.runs.run_folder import open_folder

MAIN_CONFIG = CONFIGS / "compare_backends.yaml"
failures = Failures(MAIN_CONFIG)


@dataclass(frozen=True, kw_only=True)
class CompareSettings(DiagnosisSettings):
    """What the command reads.

    Args:
        num_steps: horizons, ascending (unit: steps).
        repeats: timed runs of each backend.
        only: names of the backends to run; None for all.
    """

    num_steps: list[int] = setting(ascending_lengths)
    repeats: int = setting(partial(whole_number, minimum=1, purpose="the fastest of several timed runs is drawn"))
    only: list[str] | None = setting(partial(listed_names, example="reverse"))


_READS = Reads(settings=(CompareSettings,), blocks=("backends.*",))


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Compares, prints and writes."""
    check_reads(config, _READS)
    settings = parse(CompareSettings, config)
    settings.set_threads()
    problem, backends = training_problem(config, settings), build_backends(config, settings.only)
    folder = open_folder(config, HydraConfig.get().overrides.task)
    console = Console()
    rows: list[dict[str, object]] = []
    for num_steps in settings.num_steps:
        comparison = ht.compare_backends(
            replace(problem, num_steps=num_steps),
            problem.init_hparams(),
            backends,
            repeats=settings.repeats,
            execution=settings.execution.of(problem),
        )
        console.print(f"\n{num_steps} inner steps\n{comparison}", markup=False, highlight=False, soft_wrap=True)
        rows += [{"num_steps": num_steps, **row} for row in comparison.rows()]
    write_csv(folder.path / "comparison.csv", rows)
    write_results(folder.results, {**run_description(), "rows": [json_ready(row) for row in rows]})
    plot_comparison(rows, folder.path / "comparison.png")
    console.print(f"\neverything is in {folder.path}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
