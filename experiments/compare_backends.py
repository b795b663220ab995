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

import experiments.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.config_errors import CONFIGS
from experiments.diagnosis import (
    ascending_lengths,
    build_backends,
    build_problem,
    json_ready,
    prepare,
    run_description,
    write_csv,
)
from experiments.diagnosis_plots import plot_comparison
from experiments.failures import Failures
from experiments.reads import Reads
from experiments.reporting import write_results
from experiments.run_folder import open_folder
from experiments.settings import whole_number

failures = Failures("compare_backends")
_READS = Reads(
    command="compare_backends",
    blocks=(
        "problem",
        "backends.*",
    ),
)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="compare_backends")
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
