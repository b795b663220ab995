"""Finds a learning rate for the inner loop of an experiment by one short run whose rate grows, and draws the curve.

python experiments/lr_range_test.py
python experiments/lr_range_test.py experiment.hidden=16 'constant_rates=[0.3,1,3,10,30]'
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import one_of, positive_number, whole_number
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.diagnostics.diagnosis import DiagnosisSettings, check_reads, run_description, training_problem
from experiments.common.diagnostics.diagnosis_plots import plot_range_test
from experiments.common.results.reporting import json_ready, write_csv, write_results
from experiments.common.runs.run_folder import open_folder
from hypertorch.search import NoSuggestionError, RangeFigures, lr_range_test, with_lr

MAIN_CONFIG = CONFIGS / "lr_range_test.yaml"
failures = Failures(MAIN_CONFIG)


def _rates(config: DictConfig, key: str) -> list[float]:
    values = OmegaConf.select(config, key)
    numbers = (
        [item for item in values if isinstance(item, (int, float)) and item > 0] if OmegaConf.is_list(values) else None
    )
    if numbers is None or len(numbers) < len(values):
        raise ExpectedFailure(
            f"`{key}` is {values!r}, but learning rates to train at are a list of numbers above 0. Write for example "
            f"'{key}=[0.1,1,10]', or leave it out."
        )
    return [float(item) for item in numbers]


@dataclass(frozen=True, kw_only=True)
class RangeSettings(DiagnosisSettings):
    """What the command reads; the library checks the numbers of the test.

    Args:
        min_lr: rate of the first step.
        max_lr: rate of the last step.
        num_steps: of the test (unit: inner steps).
        half_window: steps on each side of a step that its line is fitted to.
        scale: what the slope is of.
        constant_rates: to train at for the problem's own horizon.
    """

    min_lr: float = setting(partial(positive_number, purpose="it is the first rate", example=1e-5))
    max_lr: float = setting(partial(positive_number, purpose="it is the last rate", example=100.0))
    num_steps: int = setting(partial(whole_number, minimum=1, purpose="it is the length of the test"))
    half_window: int = setting(partial(whole_number, minimum=1, purpose="a line is fitted to several losses"))
    scale: str = setting(partial(one_of, allowed=("log", "linear")))
    constant_rates: list[float] = setting(_rates)


_READS = Reads(settings=(RangeSettings,))


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Measures, prints and writes; a curve that has no rate to suggest is drawn too."""
    check_reads(config, _READS)
    settings = parse(RangeSettings, config)
    settings.set_threads()
    problem = training_problem(config, settings)
    folder = open_folder(config, HydraConfig.get().overrides.task)
    refusal, suggestion = None, None
    try:
        figures, suggestion = lr_range_test(
            problem,
            min_lr=settings.min_lr,
            max_lr=settings.max_lr,
            num_steps=settings.num_steps,
            half_window=settings.half_window,
            scale="log" if settings.scale == "log" else "linear",
            execution=settings.execution.of(problem),
        )
    except NoSuggestionError as error:
        figures, refusal = error.figures, str(error)
    # The suggestion beside the rates that are asked for.
    rates = [] if suggestion is None or not settings.constant_rates else [suggestion]
    rates = sorted([*settings.constant_rates, *rates])
    outer_losses = {rate: trained_at(problem, rate, settings) for rate in rates}
    write_csv(folder.path / "lr_range_test.csv", rows(figures))
    write_results(
        folder.results,
        {
            **run_description(),
            **json_ready(
                {
                    "suggestion": suggestion,
                    "lowest": figures.lowest,
                    "blow_up": figures.blow_up,
                    "outer_losses": json_ready({f"{rate:g}": loss for rate, loss in outer_losses.items()}),
                }
            ),
        },
    )
    plot_range_test(figures, suggestion, outer_losses, problem.num_steps, folder.path / "lr_range_test.png")
    console = Console()
    if refusal is not None:
        raise ExpectedFailure(f"{refusal} The curve is in {folder.path}.")
    blow_up = "does not blow up" if figures.blow_up is None else f"blows up at {figures.blow_up:.3g}"
    for line in (
        f"suggested learning rate: {suggestion:.3g} (the loss is lowest at {figures.lowest:.3g}, and {blow_up})",
        *(f"outer loss at the constant rate {rate:.3g}: {loss:.4g}" for rate, loss in outer_losses.items()),
        f"everything is in {folder.path}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def trained_at(problem: ht.BilevelProblem, rate: float, settings: RangeSettings) -> float:
    """Returns the outer loss after training at a constant rate, the mean over tasks."""
    own = replace(problem, dynamics=with_lr(problem.dynamics, rate), warm_start=False)
    run = ht.unroll(own, problem.init_hparams(), execution=settings.execution.of(problem))
    return float(run.outer_loss.mean())


def rows(figures: RangeFigures) -> list[dict[str, object]]:
    """Returns the curve step by step, for CSV."""
    finite = len(figures.smoothed)
    return [
        {
            "rate": float(figures.rates[step]),
            "loss": float(figures.losses[step]),
            "smoothed": float(figures.smoothed[step]) if step < finite else None,
            "slope": float(figures.slopes[step]) if step < finite else None,
        }
        for step in range(len(figures.rates))
    ]


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
