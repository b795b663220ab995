"""Measures and draws what shorter windows and shorter runs cost in accuracy.

python experiments/horizon_bias.py
python experiments/horizon_bias.py problem.hidden=16 dynamics@problem.dynamics=sgd problem.dynamics.lr=0.5
"""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.common.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.building import build
from experiments.common.config_errors import CONFIGS
from experiments.common.failures import Failures
from experiments.common.reads import Reads
from experiments.common.reporting import json_ready, write_csv, write_results
from experiments.common.run_folder import open_folder
from experiments.common.settings import ascending_lengths, prepare, whole_number
from experiments.diagnosis import build_problem, run_description
from experiments.diagnosis_plots import plot_horizon_bias

MAIN_CONFIG = CONFIGS / "horizon_bias.yaml"
failures = Failures(MAIN_CONFIG)
_READS = Reads(
    main_config=MAIN_CONFIG,
    blocks=(
        "problem",
        "implicit",
    ),
)


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Measures, prints and writes."""
    prepare(config, _READS)
    windows, num_steps = ascending_lengths(config, "windows"), ascending_lengths(config, "num_steps")
    horizon = whole_number(config, "horizon", minimum=1, purpose="windows are taken of a run of this length")
    implicit = None if OmegaConf.select(config, "implicit") is None else build(config, "implicit")
    problem = build_problem(config, horizon)
    hparams = problem.init_hparams()
    folder = open_folder(config, HydraConfig.get().overrides.task)
    bias = ht.horizon_bias(problem, hparams, windows=windows, num_steps=num_steps, implicit=implicit)
    spectrum = ht.spectral_radius(problem, hparams)
    console = Console()
    console.print(f"{bias}\n{spectrum}", markup=False, highlight=False, soft_wrap=True)
    rows = bias.rows()
    write_csv(folder.path / "horizon_bias.csv", rows)
    write_results(
        folder.results,
        {
            **run_description(),
            "spectral_radius": spectrum.radius,
            "rates": {name: None if fit is None else fit.rate for name, fit in bias.fits.items()},
            "rows": [json_ready(row) for row in rows],
        },
    )
    plot_horizon_bias(bias, spectrum.radius, folder.path / "horizon_bias.png")
    console.print(f"everything is in {folder.path}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
