"""Measures and draws what shorter windows and shorter runs cost in accuracy.

python experiments/horizon_bias.py
python experiments/horizon_bias.py experiment.hidden=16 dynamics=sgd dynamics.lr=0.5
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import Failures
from experiments.common.configuration.building import build
from experiments.common.configuration.readers import ascending_lengths, whole_number
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.diagnostics.diagnosis import DiagnosisSettings, check_reads, run_description, training_problem
from experiments.common.diagnostics.diagnosis_plots import plot_horizon_bias
from experiments.common.results.reporting import json_ready, write_csv, write_results
from experiments.common.runs.run_folder import open_folder

MAIN_CONFIG = CONFIGS / "horizon_bias.yaml"
failures = Failures(MAIN_CONFIG)


@dataclass(frozen=True, kw_only=True)
class HorizonSettings(DiagnosisSettings):
    """What the command reads.

    Args:
        horizon: length of the run that windows are taken of (unit: steps).
        windows: trailing steps that are differentiated, ascending.
        num_steps: lengths of runs, ascending.
    """

    horizon: int = setting(partial(whole_number, minimum=1, purpose="windows are taken of a run of this length"))
    windows: list[int] = setting(ascending_lengths)
    num_steps: list[int] = setting(ascending_lengths)


_READS = Reads(settings=(HorizonSettings,), blocks=("implicit",))


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Measures, prints and writes."""
    check_reads(config, _READS)
    settings = parse(HorizonSettings, config)
    settings.set_threads()
    implicit = None if OmegaConf.select(config, "implicit") is None else build(config, "implicit")
    problem = training_problem(config, settings, settings.horizon)
    hparams = problem.init_hparams()
    folder = open_folder(config, HydraConfig.get().overrides.task)
    execution = settings.execution.of(problem)
    bias = ht.horizon_bias(
        problem,
        hparams,
        windows=settings.windows,
        num_steps=settings.num_steps,
        implicit=implicit,
        execution=execution,
    )
    spectrum = ht.spectral_radius(problem, hparams, execution=execution)
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
