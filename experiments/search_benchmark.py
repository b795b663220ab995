"""Searches of hyperparameters beside each other, with and without gradients: regret, and loss at equal CPU.

python experiments/search_benchmark.py
python experiments/search_benchmark.py seeds=3 'only=[branin]'

Killed at any moment, the same command goes on where it was: a search that has ended is only read.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import listed_names, switch, text, thread_count, whole_number
from experiments.common.configuration.reads import Reads, check_settings_are_read
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.results.line_styles import line_styles
from experiments.common.results.reporting import versions, write_results
from experiments.common.runs.cells import write_rows
from experiments.common.runs.run_folder import read_results
from experiments.common.search.search_methods import METHODS
from experiments.common.search.search_tasks import TASKS, digits_task

MAIN_CONFIG = CONFIGS / "search_benchmark.yaml"
failures = Failures(MAIN_CONFIG)
_COLUMNS = ("task", "search", "evaluations", "seeds", "median", "quartiles", "CPU seconds")
_AT_EQUAL_CPU = ("search", "seeds", "loss at cost 20", "loss at cost 40", "loss at cost 70", "evaluations to 3 %")
_COSTS = (20, 40, 70)
_NEAR_BEST = 1.03
_TIMED = 20
# What is drawn of a regret of 0.
_LEAST_DRAWN = 1e-9


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What the command reads, beside its tables.

    Args:
        cells: folder of what was run.
        run: whether what is missing is run.
        threads: of PyTorch's operations.
        seeds: of the searches, from 0.
        only: the tasks; None for all.
        digits_with_gradients: evaluations with gradients on the digits.
        digits_seeds: seeds there.
        resume: nothing beside the cells is resumed.
    """

    cells: str = setting(text)
    run: bool = setting(switch)
    threads: int = setting(thread_count)
    seeds: int = setting(partial(whole_number, minimum=1, purpose="a median needs a search"))
    only: list[str] | None = setting(partial(listed_names, example="branin"))
    digits_with_gradients: int = setting(partial(whole_number, minimum=1, purpose="it is the length of a search"))
    digits_seeds: int = setting(partial(whole_number, minimum=1, purpose="a median needs a search"))
    resume: bool = setting(switch)


_READS = Reads(settings=(BenchmarkSettings,), entries=("tasks.*", "methods.*"))


@dataclass(frozen=True, kw_only=True)
class SearchCell:
    """One search of one task with one seed.

    Args:
        task: its name.
        method: name of the search.
        evaluations: how many.
        seed: of the task and of the search.
        file: where its values are.
    """

    task: str
    method: str
    evaluations: int
    seed: int
    file: Path

    def run(self) -> None:
        """Searches, and writes the values."""
        start = time.process_time()
        values = METHODS[self.method].run(TASKS[self.task](self.seed), self.evaluations, self.seed)
        seconds = time.process_time() - start
        self.file.parent.mkdir(parents=True, exist_ok=True)
        finite = [value if math.isfinite(value) else None for value in values]
        write_results(self.file, {"values": finite, "cpu_seconds": seconds, "versions": versions()})

    def seconds(self) -> float:
        """Returns what the search took, its evaluations among it (unit: CPU seconds)."""
        return float(read_results(self.file)["cpu_seconds"])

    def best_so_far(self) -> list[float]:
        """Returns the least value, or regret where the minimum is known, after each evaluation.

        Raises:
            ExpectedFailure: if the file has another number of evaluations.
        """
        values = read_results(self.file)["values"]
        if len(values) != self.evaluations:
            raise ExpectedFailure(
                f"`cells` has {str(self.file)!r} with {len(values)} evaluations, where {self.evaluations} are asked "
                "for. Give another folder with cells=..., or delete the file."
            )
        least = TASKS[self.task](self.seed).least
        numbers = np.array([math.inf if value is None else value for value in values])
        return (np.minimum.accumulate(numbers) - (least or 0.0)).tolist()


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Runs what is missing, and writes the tables and pictures after each task."""
    check_settings_are_read(config, _READS)
    own = parse(BenchmarkSettings, config)
    torch.set_num_threads(own.threads)
    console = Console()
    folder = Path(own.cells).parent
    cells = list(planned_cells(config))
    for task in dict.fromkeys(cell.task for cell in cells):
        for cell in [cell for cell in cells if cell.task == task and own.run and not cell.file.is_file()]:
            console.print(f"{cell.task}, {cell.method}, seed {cell.seed}", highlight=False)
            cell.run()
        there = [cell for cell in cells if cell.file.is_file()]
        write_rows(folder, _COLUMNS, list(rows(there)))
        plot(task, [cell for cell in there if cell.task == task], folder / f"{task}.png")
        if task == "digits":
            write_equal_cpu(folder, [cell for cell in there if cell.task == task], own.run)
    console.print((folder / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    console.print(f"everything is in {folder}", markup=False, highlight=False, soft_wrap=True)


def planned_cells(config: DictConfig) -> Iterator[SearchCell]:
    """Yields the cells in the order in which they are run.

    Raises:
        ExpectedFailure: if a task or a search is not known.
    """
    own = parse(BenchmarkSettings, config)
    for name in own.only or config.tasks:
        if name not in config.tasks or name not in TASKS:
            raise ExpectedFailure(f"`only` or `tasks` names {name!r}, which is no task. Choose of {list(TASKS)}.")
        for method in config.methods[name]:
            if method not in METHODS:
                raise ExpectedFailure(
                    f"`methods.{name}` names {method!r}, which is no search. Choose of {list(METHODS)}."
                )
            is_digits = name == "digits"
            shortened = is_digits and METHODS[method].with_gradients
            for seed in range(min(own.seeds, own.digits_seeds) if is_digits else own.seeds):
                yield SearchCell(
                    task=name,
                    method=method,
                    evaluations=own.digits_with_gradients if shortened else int(config.tasks[name]),
                    seed=seed,
                    file=Path(own.cells) / f"{name}-{method.replace(' ', '_')}-{seed}.json",
                )


def by_method(cells: Sequence[SearchCell]) -> dict[str, list[SearchCell]]:
    """Returns the cells of one task by their search."""
    return {name: [cell for cell in cells if cell.method == name] for name in dict.fromkeys(c.method for c in cells)}


def rows(cells: Sequence[SearchCell]) -> Iterator[dict[str, str]]:
    """Yields a row for each task and search: the median over seeds of the last best value."""
    for task in dict.fromkeys(cell.task for cell in cells):
        for method, own in by_method([cell for cell in cells if cell.task == task]).items():
            last = [cell.best_so_far()[-1] for cell in own]
            low, high = np.quantile(last, [0.25, 0.75])
            yield {
                "task": task,
                "search": method,
                "evaluations": str(own[0].evaluations),
                "seeds": str(len(own)),
                "median": f"{statistics.median(last):.2g}",
                "quartiles": f"{low:.2g} to {high:.2g}",
                "CPU seconds": f"{statistics.median(cell.seconds() for cell in own):.1f}",
            }


def best_of_seed(cells: Sequence[SearchCell], seed: int) -> float:
    """Returns the least value that any search of a task found with a seed."""
    return min(cell.best_so_far()[-1] for cell in cells if cell.seed == seed)


def plot(task: str, cells: Sequence[SearchCell], path: Path) -> None:
    """Draws the median of the regret, with the quartiles, over the evaluations.

    Where the minimum is not known, it is the distance from the best of all searches with the same seed.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    groups = by_method(cells)
    known = TASKS[task](0).least is not None
    least = {cell.seed: 0.0 if known else best_of_seed(cells, cell.seed) for cell in cells}
    for (method, own), style in zip(groups.items(), line_styles(groups).values(), strict=True):
        curves = np.maximum([np.array(cell.best_so_far()) - least[cell.seed] for cell in own], _LEAST_DRAWN)
        low, middle, high = np.quantile(curves, [0.25, 0.5, 0.75], axis=0)
        count = range(1, len(middle) + 1)
        axes.plot(count, middle, label=method, markevery=5, **{**style, "markersize": 5})
        axes.fill_between(count, low, high, color=style["color"], alpha=0.12, linewidth=0)
    label = "regret of the best so far" if known else "loss above the best of all searches"
    axes.set(xlabel="evaluations", ylabel=label, yscale="log", title=f"{task}: median and quartiles over seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def write_equal_cpu(folder: Path, cells: Sequence[SearchCell], run: bool) -> None:
    """Writes the losses that searches reach at the same cost, where an evaluation without gradient costs 1.

    Args:
        folder: where to.
        cells: of the digits.
        run: whether what an evaluation costs is measured, if it was not yet.
    """
    file = folder / "cost.json"
    if not file.is_file():
        if not run:
            return
        write_results(file, {"ratio": cost_ratio()})
    ratio = float(read_results(file)["ratio"])
    curves = {method: [cell.best_so_far() for cell in own] for method, own in by_method(cells).items()}
    table = []
    for method, own in curves.items():
        price = ratio if METHODS[method].with_gradients else 1.0
        row = {"search": method, "seeds": str(len(own))}
        for cost, column in zip(_COSTS, _AT_EQUAL_CPU[2:5], strict=True):
            count = math.floor(cost / price)
            known = count <= len(own[0])
            row[column] = f"{statistics.median(curve[count - 1] for curve in own):.4f} ({count})" if known else ""
        needed = [
            # Seeds are other data, each with its own best loss.
            next((n for n, value in enumerate(curve, 1) if value <= _NEAR_BEST * best_of_seed(cells, seed)), None)
            for seed, curve in enumerate(own)
        ]
        row["evaluations to 3 %"] = ", ".join("never" if number is None else str(number) for number in needed)
        table.append(row)
    write_rows(folder / "equal_cpu", _AT_EQUAL_CPU, table)


def cost_ratio() -> float:
    """Returns what an evaluation with gradient costs on the digits, over one without (CPU time, medians)."""
    task = digits_task(0)
    point = torch.full((task.dimension,), 0.5, dtype=torch.float64)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_TIMED):
        for with_gradient, own in seconds.items():
            start = time.process_time()
            task.evaluate(point, with_gradient)
            own.append(time.process_time() - start)
    return statistics.median(seconds[True]) / statistics.median(seconds[False])


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
