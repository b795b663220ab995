"""Measures and draws the eigenvalues of the inner steps, and the growth of their product.

python experiments/spectral_radius.py
python experiments/spectral_radius.py experiment.hidden=16 dynamics.lr=40
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import as_given, ascending_lengths, whole_number
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.diagnostics.diagnosis import DiagnosisSettings, check_reads, run_description, training_problem
from experiments.common.diagnostics.diagnosis_plots import plot_spectral_radius
from experiments.common.results.reporting import json_ready, write_csv, write_results
from experiments.common.runs.run_folder import open_folder

MAIN_CONFIG = CONFIGS / "spectral_radius.yaml"
failures = Failures(MAIN_CONFIG)


@dataclass(frozen=True, kw_only=True)
class SpectrumSettings(DiagnosisSettings):
    """What the command reads.

    Args:
        horizon: length of the run (unit: steps).
        steps: whose map is looked at, ascending, beside the last.
        dimension: of the Krylov space.
        max_restarts: of the iteration.
    """

    horizon: int = setting(partial(whole_number, minimum=1, purpose="it is the length of the run"))
    steps: list[int] = setting(partial(ascending_lengths, minimum=0))
    dimension: int = setting(as_given)
    max_restarts: int = setting(as_given)


_READS = Reads(settings=(SpectrumSettings,))


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Measures, prints and writes."""
    check_reads(config, _READS)
    settings = parse(SpectrumSettings, config)
    settings.set_threads()
    steps = sorted({*settings.steps, settings.horizon - 1})
    problem = training_problem(config, settings, settings.horizon)
    if problem.num_tasks is not None:
        raise ExpectedFailure(
            f"`experiment` names one whose problem is a batch of {problem.num_tasks} tasks, each with a map of its "
            "own: there is no one spectrum to draw. Choose an experiment with one inner problem."
        )
    hparams = problem.init_hparams()
    folder = open_folder(config, HydraConfig.get().overrides.task)
    spectra = [
        ht.spectral_radius(
            problem,
            hparams,
            step=step,
            dimension=settings.dimension,
            max_restarts=settings.max_restarts,
            execution=settings.execution.of(problem),
        )
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
