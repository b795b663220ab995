"""Runs every configured backend on one problem at several horizons, and draws error, time and memory.

python experiments/compare_backends.py
python experiments/compare_backends.py 'num_steps=[10,100,1000]' 'only=[reverse,reverse_sqrt,truncated_20]'
"""

from __future__ import annotations

import sys
from dataclasses import replace

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

import experiments.common.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.config_errors import CONFIGS
from experiments.common.failures import Failures
from experiments.common.reads import Reads
from experiments.common.reporting import json_ready, write_csv, write_results
from experiments.common.run_folder import open_folder
from experiments.common.settings import ascending_lengths, prepare, whole_number
from experiments.diagnosis import build_backends, build_problem, run_description
from experiments.diagnosis_plots import plot_comparison

MAIN_CONFIG = CONFIGS / "compare_backends.yaml"
failures = Failures(MAIN_CONFIG)
_READS = Reads(
    main_config=MAIN_CONFIG,
    blocks=(
        "problem",
        "backends.*",
    ),
)


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Compares, prints and writes."""
    prepare(config, _READS)
    horizons = ascending_lengths(config, "num_steps")
    repeats = whole_number(config, "repeats", minimum=1, purpose="the fastest of several timed runs is drawn")
    problem, backends = build_problem(config, horizons[-1]), build_backends(config)
    folder = open_folder(config, HydraConfig.get().overrides.task)
    console = Console()
    rows: list[dict[str, object]] = []
    for num_steps in horizons:
        comparison = ht.compare_backends(
            replace(problem, num_steps=num_steps), problem.init_hparams(), backends, repeats=repeats
        )
        console.print(f"\n{num_steps} inner steps\n{comparison}", markup=False, highlight=False, soft_wrap=True)
        rows += [{"num_steps": num_steps, **row} for row in comparison.rows()]
    write_csv(folder.path / "comparison.csv", rows)
    write_results(folder.results, {**run_description(), "rows": [json_ready(row) for row in rows]})
    plot_comparison(rows, folder.path / "comparison.png")
    console.print(f"\neverything is in {folder.path}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
