"""Runs hypertorch, higher, TorchOpt and plain training on the same work, and compares time, memory and results.

scripts/benchmark                                  everything, on the CPU (hours)
scripts/benchmark --cuda                           the same on a GPU
scripts/benchmark 'only=[small_unroll]'            one work
scripts/benchmark quick=true                       tiny sizes: a look at whether everything runs
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.assembly import build
from experiments.benchmarks import variants
from experiments.benchmarks.charts import plot_sweep
from experiments.benchmarks.machine import library_versions, machine
from experiments.benchmarks.measure import Settings, measure
from experiments.benchmarks.memory import available_bytes
from experiments.benchmarks.ratios import Ratio, measured_ratio
from experiments.benchmarks.row import Row
from experiments.benchmarks.sweep import Growth, crossover, growth
from experiments.benchmarks.tables import ratio_lines, table_of_growth, table_of_rows
from experiments.benchmarks.timing import Rounds
from experiments.benchmarks.work import Work
from experiments.config_errors import CONFIGS
from experiments.diagnosis import ascending_lengths, json_ready, prepare, write_csv
from experiments.failures import ExpectedFailure, Failures
from experiments.reporting import write_results
from experiments.run_folder import command, open_folder
from experiments.settings import chosen_device, chosen_dtype, whole_number
from hypertorch.live_memory import parse_bytes

failures = Failures("benchmark")
_SHARE_OF_FREE_MEMORY = 0.8
_UNKNOWN_MEMORY = 2**33
_QUICK_SIZES = 2
_QUICK_ROUNDS = Rounds(repetitions=2, shortest=0.0, longest=5.0)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was measured so far, and where it is written."""

    folder: Path
    header: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    sweeps: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes everything anew, so that an interrupted benchmark leaves what it has measured.

        Args:
            path: of results.json.
        """
        write_csv(self.folder / "rows.csv", [row.flat() for row in self.rows])
        write_csv(self.folder / "ratios.csv", [ratio.as_dict() for ratio in self.ratios])
        (self.folder / "ratios.md").write_text("\n".join(ratio_lines(self.ratios)) + "\n", encoding="utf-8")
        measured = {
            "rows": [json_ready(row.as_dict()) for row in self.rows],
            "ratios": [json_ready(ratio.as_dict()) for ratio in self.ratios],
            "sweeps": self.sweeps,
        }
        write_results(path, {**self.header, **measured})


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="benchmark")
@failures.reported
def main(config: DictConfig) -> None:
    """Measures, prints and writes."""
    prepare(config)
    settings = build_settings(config)
    works, sweeps = chosen_names(config)
    # All of them before the first is run: a mistake in the last must not be found after hours.
    built = {name: _sized(build(config, f"works.{name}"), config) for name in works}
    swept = {name: build_sweep(config, name) for name in sweeps}
    refuse_unknown_contestants(
        settings, [*built.values(), *(work for sizes in swept.values() for work in sizes.values())]
    )
    folder = open_folder(config, HydraConfig.get().overrides.task)
    console = Console()
    results = Results(folder=folder.path, header=header(config, settings))

    def say(text: str) -> None:
        console.print(f"  {text}", style="dim", highlight=False)

    for name, work in built.items():
        run_work(name, work, settings, results, console, say)
        results.write(folder.results)
    for name, sizes in swept.items():
        run_sweep(name, sizes, str(config.sweeps[name].axis), settings, results, console, say)
        results.write(folder.results)
    results.write(folder.results)
    console.print("\n".join(["", *ratio_lines(results.ratios)]), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\neverything is in {folder.path}", markup=False, highlight=False, soft_wrap=True)


def run_work(
    name: str, work: Work, settings: Settings, results: Results, console: Console, say: Callable[[str], None]
) -> None:
    """Measures a work, and adds its rows and ratios to the results."""
    console.print(f"\n{work.title}", markup=False, highlight=False)
    rows = measure(name, work, None, settings, say)
    console.print(table_of_rows(rows))
    results.rows.extend(rows)
    results.ratios.extend(measured_ratio(target, rows) for target in work.targets())


def run_sweep(
    name: str,
    works: Mapping[int, Work],
    axis: str,
    settings: Settings,
    results: Results,
    console: Console,
    say: Callable[[str], None],
) -> None:
    """Measures a work at every size, draws it, and adds rows, exponents and crossover to the results."""
    rows: list[Row] = []
    targets = {size: work.targets() for size, work in works.items()}
    for size, work in works.items():
        console.print(f"\n{name}: {work.title}", markup=False, highlight=False)
        of_size = measure(name, work, size, settings, say)
        console.print(table_of_rows(of_size))
        rows += of_size
        results.rows.extend(of_size)
    names = list(dict.fromkeys(row.contestant for row in rows))
    exponents: dict[str, dict[str, Growth | None]] = {
        key: {
            quantity: growth([row for row in rows if row.contestant == key], quantity)
            for quantity in ("time", "memory")
        }
        for key in names
    }
    console.print(table_of_growth(f"{name}: growth with {axis}", exponents))
    results.sweeps[name] = {
        "axis": axis,
        "exponents": {
            key: {quantity: None if fit is None else asdict(fit) for quantity, fit in found.items()}
            for key, found in exponents.items()
        },
    }
    if variants.FORWARD in names:
        results.sweeps[name]["forward_crosses_reverse_at"] = crossover(rows, variants.FORWARD, variants.EAGER)
        for size in works:
            results.ratios.extend(
                measured_ratio(target, [row for row in rows if row.size == size]) for target in targets[size]
            )
    plot_sweep(rows, exponents, targets, axis=axis, path=results.folder / f"{name}.png")


def build_settings(config: DictConfig) -> Settings:
    """Returns how to measure.

    Raises:
        ExpectedFailure: if a setting cannot be used.
    """
    names = None if config.contestants is None else list(config.contestants)
    rounds = Rounds(
        repetitions=whole_number(config, "repetitions", minimum=1, purpose="the median is taken over them"),
        shortest=float(config.shortest_repetition),
        longest=float(config.longest_timing),
    )
    limit = config.memory_limit
    free = available_bytes()
    return Settings(
        seed=config.seed,
        device=chosen_device(config),
        dtype=chosen_dtype(config),
        rounds=_QUICK_ROUNDS if config.quick else rounds,
        tolerance=float(config.tolerance),
        memory=bool(config.memory),
        memory_limit=(
            parse_bytes(limit, "memory_limit")
            if limit is not None
            else _UNKNOWN_MEMORY
            if free is None
            else int(_SHARE_OF_FREE_MEMORY * free)
        ),
        longest_run=float(config.longest_run),
        longest_work=float(config.longest_work),
        contestants=names,
    )


def refuse_unknown_contestants(settings: Settings, works: Sequence[Work]) -> None:
    """Raises if a contestant takes part in none of the works.

    Raises:
        ExpectedFailure: naming it.
    """
    known = list(dict.fromkeys(name for work in works for name in work.contestants()))
    for name in settings.contestants or ():
        if name not in known:
            raise ExpectedFailure(
                f"`contestants` names {name!r}, which takes part in none of the works. Choose from: {', '.join(known)}."
            )


def chosen_names(config: DictConfig) -> tuple[list[str], list[str]]:
    """Returns the names of the works and of the sweeps to run: all, or those that `only` names.

    Raises:
        ExpectedFailure: if `only` names others.
    """
    works, sweeps = [str(name) for name in config.works], [str(name) for name in config.sweeps]
    if config.only is None:
        return works, sweeps
    for name in config.only:
        if name not in [*works, *sweeps]:
            raise ExpectedFailure(
                f"`only` names {name!r}, which is neither a work nor a sweep. Choose from: "
                f"{', '.join([*works, *sweeps])}."
            )
    return [name for name in works if name in config.only], [name for name in sweeps if name in config.only]


def build_sweep(config: DictConfig, name: str) -> dict[int, Work]:
    """Returns the works of a sweep by their size, ascending.

    Raises:
        ExpectedFailure: if the work has no such size.
    """
    work: Work = build(config, f"sweeps.{name}.work")
    size = str(config.sweeps[name].size)
    sizes = [item.name for item in fields(work)] if is_dataclass(work) else []
    if size not in sizes:
        raise ExpectedFailure(
            f"`sweeps.{name}.size` is {size!r}, which is no size of {type(work).__name__}, so nothing would grow. Use "
            f"one of: {', '.join(sizes)}."
        )
    values = ascending_lengths(config, f"sweeps.{name}.values")
    if config.quick:
        work, values = work.tiny(), values[:_QUICK_SIZES]
    return {value: _resized(work, size, value) for value in values}


def header(config: DictConfig, settings: Settings) -> dict[str, Any]:
    """Returns what determines the numbers, for results.json, which adds the date."""
    shown = {key: value for key, value in OmegaConf.to_container(config, resolve=True).items() if key != "paths"}  # type: ignore[union-attr]
    return {
        "command": command("scripts/benchmark", HydraConfig.get().overrides.task),
        "versions": library_versions(),
        "machine": machine(settings.device),
        "memory_limit_bytes": settings.memory_limit,
        "settings": shown,
    }


def _sized(work: Work, config: DictConfig) -> Work:
    return work.tiny() if config.quick else work


def _resized(work: Any, size: str, value: int) -> Work:
    return replace(work, **{size: value})


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
