"""Measures and draws the eigenvalues of the inner steps, and the growth of their product.

python experiments/spectral_radius.py
python experiments/spectral_radius.py problem.dynamics.lr=40
"""

from __future__ import annotations

import sys

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
from experiments.diagnosis import build_problem, run_description
from experiments.diagnosis_plots import plot_spectral_radius

MAIN_CONFIG = CONFIGS / "spectral_radius.yaml"
failures = Failures(MAIN_CONFIG)
_READS = Reads(main_config=MAIN_CONFIG, blocks=("problem",))


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Measures, prints and writes."""
    prepare(config, _READS)
    horizon = whole_number(config, "horizon", minimum=1, purpose="it is the length of the run")
    steps = sorted({*ascending_lengths(config, "steps", minimum=0), horizon - 1})
    problem = build_problem(config, horizon)
    hparams = problem.init_hparams()
    folder = open_folder(config, HydraConfig.get().overrides.task)
    spectra = [
        ht.spectral_radius(problem, hparams, step=step, dimension=config.dimension, max_restarts=config.max_restarts)
        for step in steps
    ]
    console = Console()
    for spectrum in spectra:
        console.print(str(spectrum), markup=False, highlight=False, soft_wrap=True)
    rows = [row(spectrum) for spectrum in spectra]
    write_csv(folder.path / "spectral_radius.csv", rows)
    write_results(
        folder.results,
        {
            **run_description(),
            "verdict": spectra[-1].verdict,
            "step_growths": spectra[-1].step_growths.tolist(),
            "rows": [json_ready(item) for item in rows],
        },
    )
    plot_spectral_radius(spectra, folder.path / "spectral_radius.png")
    console.print(f"everything is in {folder.path}", markup=False, highlight=False, soft_wrap=True)


def row(spectrum: ht.SpectralRadius) -> dict[str, object]:
    """Returns the figures of one step's map, for JSON or CSV."""
    eigenvalue = complex(spectrum.eigenvalues)
    return {
        "step": spectrum.step,
        "radius": spectrum.radius,
        "real": eigenvalue.real,
        "imaginary": eigenvalue.imag,
        "residual": float(spectrum.residuals),
        "growth": spectrum.growth,
        "verdict": spectrum.verdict,
    }


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
