"""Measures and draws which changes of training make its hypergradient predict what a step of the outer variables does.

python experiments/metasmoothness.py
python experiments/metasmoothness.py step_size=1.0 '+variants.short_steps=["dynamics.lr=0.003"]'
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from experiments.common.commands.config_errors import CONFIGS, one_line
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import listed_names, positive_number, whole_number
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.diagnostics.diagnosis import DiagnosisSettings, check_reads, run_description
from experiments.common.results.line_styles import COLOURS
from experiments.common.results.reporting import json_ready, write_csv, write_results
from experiments.common.runs.experiment import build_experiment
from experiments.common.runs.run_folder import open_folder

MAIN_CONFIG = CONFIGS / "metasmoothness.yaml"
failures = Failures(MAIN_CONFIG)


@dataclass(frozen=True, kw_only=True)
class SmoothnessSettings(DiagnosisSettings):
    """What the command reads beside its variants.

    Args:
        step_size: length of a move of the outer variables.
        num_problems: outer steps whose problem is measured at the first outer variables.
        only: names of the variants to measure; None for all.
    """

    step_size: float = setting(partial(positive_number, purpose="it is the length of a move", example=5.0))
    num_problems: int = setting(partial(whole_number, minimum=1, purpose="each is measured"))
    only: list[str] | None = setting(partial(listed_names, example="large_batch"))


_READS = Reads(settings=(SmoothnessSettings,), entries=("variants.*",))


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Measures, prints and writes."""
    check_reads(config, _READS)
    settings = parse(SmoothnessSettings, config)
    settings.set_threads()
    sources = {name: build_experiment(own, settings).training() for name, own in variants(config, settings.only)}
    folder = open_folder(config, HydraConfig.get().overrides.task)
    rows = [row for name, source in sources.items() for row in measured(name, source, settings)]
    write_csv(folder.path / "metasmoothness.csv", rows)
    write_results(folder.results, {**run_description(), "rows": [json_ready(row) for row in rows]})
    draw_smoothness(rows, settings.step_size, folder.path / "metasmoothness.png")
    table = Table("", "smoothness", "predicted change", "actual change", "error of the prediction (%)")
    for name in sources:
        own = [row for row in rows if row["variant"] == name]
        table.add_row(
            name,
            *(_spread([row[key] for row in own]) for key in ("smoothness", "predicted", "actual")),
            _spread([100 * row["error"] for row in own]),
        )
    console = Console()
    console.print(table)
    console.print(f"everything is in {folder.path}", markup=False, highlight=False, soft_wrap=True)


def variants(config: DictConfig, only: list[str] | None) -> Iterator[tuple[str, DictConfig]]:
    """Yields the configuration of each variant by name, that of no change first.

    Raises:
        ExpectedFailure: if `only` names what is no variant, or a variant changes what is no setting.
    """
    yield "as it is", config
    for name in config.variants if only is None else only:
        if name not in config.variants:
            raise ExpectedFailure(
                f"`only` names {name!r}, which is not among the variants {list(config.variants)}. Choose of these, or "
                f"add it: '+variants.{name}=[\"dynamics.eps=0.01\"]'."
            )
        words = config.variants[name]
        own = deepcopy(config)
        try:
            own.merge_with_dotlist(list(words))
        except (OmegaConfBaseException, ValueError) as error:
            raise ExpectedFailure(
                f"`variants.{name}` is {list(words)}, which cannot be set ({one_line(error)}). List settings of the "
                "experiment or of its dynamics, such as dynamics.eps=0.01."
            ) from error
        check_reads(own, _READS)
        yield name, own


def measured(name: str, source: ht.ProblemSource, settings: SmoothnessSettings) -> Iterator[dict[str, Any]]:
    """Yields the figures of the problems of a variant, one for each outer step."""
    hparams = source.init_hparams()
    for outer_step in range(settings.num_problems):
        problem = source.at(outer_step)
        found = ht.metasmoothness(
            problem,
            hparams,
            step_size=settings.step_size,
            outer_step=outer_step,
            execution=settings.execution.of(problem),
        )
        yield {
            "variant": name,
            "smoothness": found.smoothness,
            "predicted": found.predicted,
            "actual": found.actual,
            "error": found.error,
        }


def draw_smoothness(rows: Sequence[dict[str, Any]], step_size: float, path: Path) -> None:
    """Draws metasmoothness and the error of the prediction, with a point for each problem and a bar for their mean.

    Args:
        rows: of all variants.
        step_size: the length of a move.
        path: the picture.
    """
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(10, 1.2 + 0.36 * len(names)), layout="constrained")
    panels = {"smoothness": ("metasmoothness (1: params go on as they began)", 1.0)}
    panels["error"] = ("error of the predicted change of the outer loss (%)", 100.0)
    for axes, (key, (label, scale)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for place, name in enumerate(names):
            own = [scale * row[key] for row in rows if row["variant"] == name]
            axes.barh(place, fmean(own), color=COLOURS[0], alpha=0.35)
            axes.plot(own, [place] * len(own), "o", color=COLOURS[0], markersize=4)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set(xlabel=label)
        axes.grid(axis="x", alpha=0.25)
        axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    figure.suptitle(f"Moves of length {step_size:g} along the hypergradient; a point for each problem")
    figure.savefig(path, dpi=100)


def _spread(values: Sequence[float]) -> str:
    """Returns mean and standard deviation; the value alone of one."""
    mean = f"{fmean(values):.3g}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.2g}"


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
