"""Draws hypergradients over two hyperparameters of an experiment as a vector field, with the outer loss as contours.

python experiments/hyperfield.py
python experiments/hyperfield.py experiment=noisy_digits 'y="trust[9]"' 'y_range=[-4,4]'
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import one_of, text, whole_number
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.diagnostics.diagnosis import DiagnosisSettings, check_reads, run_description, training_problem
from experiments.common.diagnostics.diagnosis_plots import plot_field
from experiments.common.diagnostics.settings_grid import Axis, Field, field
from experiments.common.results.reporting import duration, json_ready, write_csv, write_results
from experiments.common.runs.run_folder import open_folder

MAIN_CONFIG = CONFIGS / "hyperfield.yaml"
failures = Failures(MAIN_CONFIG)


def interval(config: DictConfig, key: str) -> tuple[float, float]:
    """Returns two ascending numbers of the configuration.

    Raises:
        ExpectedFailure: if it is anything else.
    """
    given = OmegaConf.select(config, key)
    values = list(given) if isinstance(given, ListConfig) else []
    if (
        len(values) != 2
        or any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values)
        or not float("-inf") < values[0] < values[1] < float("inf")
    ):
        raise ExpectedFailure(
            f"`{key}` is {given!r}, but two ascending numbers are needed: the first and the last value of an axis. "
            f"Write for example '{key}=[0.01,1.0]'."
        )
    return float(values[0]), float(values[1])


_SCALES: tuple[Literal["linear", "log"], ...] = ("linear", "log")


@dataclass(frozen=True, kw_only=True)
class FieldSettings(DiagnosisSettings):
    """What the command reads.

    Args:
        x: the hyperparameter to the right: a setting such as `dynamics.lr`, or an outer variable such as `trust[9]`.
        x_range: its first and last value.
        x_scale: linear or log.
        y: the hyperparameter upwards.
        y_range: its first and last value.
        y_scale: linear or log.
        points: along each axis.
        num_steps: the horizon (unit: inner steps).
    """

    x: str = setting(text)
    x_range: tuple[float, float] = setting(interval)
    x_scale: str = setting(partial(one_of, allowed=_SCALES))
    y: str = setting(text)
    y_range: tuple[float, float] = setting(interval)
    y_scale: str = setting(partial(one_of, allowed=_SCALES))
    points: int = setting(partial(whole_number, minimum=2, purpose="an axis has two ends"))
    num_steps: int = setting(partial(whole_number, minimum=1, purpose="a run without steps has no hypergradient"))

    def axes(self) -> tuple[Axis, Axis]:
        """Returns the two axes.

        Raises:
            ExpectedFailure: if a logarithm is taken of what is not positive.
        """
        for name, scale, (start, _) in (("x", self.x_scale, self.x_range), ("y", self.y_scale, self.y_range)):
            if scale == "log" and start <= 0:
                raise ExpectedFailure(
                    f"`{name}_range` starts at {start}, which has no logarithm. Start above 0, or write "
                    f"{name}_scale=linear."
                )
        scales = {scale: scale for scale in _SCALES}
        return (
            Axis(name=self.x, start=self.x_range[0], stop=self.x_range[1], scale=scales[self.x_scale]),  # type: ignore[index]
            Axis(name=self.y, start=self.y_range[0], stop=self.y_range[1], scale=scales[self.y_scale]),  # type: ignore[index]
        )


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Computes, prints and writes."""
    check_reads(config, Reads(settings=(FieldSettings,)))
    settings = parse(FieldSettings, config)
    settings.set_threads()
    axes = settings.axes()
    problem = training_problem(config, settings, settings.num_steps)
    start, cpu_start = time.perf_counter(), time.process_time()
    backend = ht.hypergradients.Reverse(checkpoint_every="sqrt")
    own = settings.execution
    # Not `of(problem)`: the points are the tasks, and the problem has none.
    execution = ht.Execution(tasks=own.tasks, chunk=own.chunk, inner_dtype=own.inner_dtype)
    found = field(problem, axes, settings.points, backend, execution)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    folder = open_folder(config, HydraConfig.get().overrides.task)
    rows = table(found)
    write_csv(folder.path / "field.csv", rows)
    write_results(
        folder.results,
        {
            **run_description(),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "rows": [json_ready(row) for row in rows],
        },
    )
    plot_field(found, settings.num_steps, folder.path / "field.png")
    lost = int((~found.losses.isfinite() | found.hypergradients[0].isnan()).sum())
    best = rows[int(torch.where(found.losses.isfinite(), found.losses, torch.inf).argmin())]
    console = Console()
    for line in (
        f"{len(rows)} points in {duration(seconds)} ({cpu_seconds:.0f} CPU seconds); {lost} of them diverged",
        f"least outer loss {best['outer_loss']:.4f} at {settings.x}={best[settings.x]:.4g}, "
        f"{settings.y}={best[settings.y]:.4g}",
        f"everything is in {folder.path}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def table(found: Field) -> list[dict[str, float]]:
    """Returns a row for every point: the two values, the outer loss, and the hypergradient in the drawn coordinates."""
    columns = {
        **{axis.name: axis.values(own).tolist() for axis, own in zip(found.axes, found.coordinates, strict=True)},
        "outer_loss": found.losses.tolist(),
        **{
            f"hypergradient {axis.name}": own.tolist()
            for axis, own in zip(found.axes, found.hypergradients, strict=True)
        },
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
