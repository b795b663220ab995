"""Search against hypergradients at equal CPU time: which finds the better hyperparameters, by how many there are.

python experiments/search_against_gradients.py
python experiments/search_against_gradients.py seeds=1 budget=1 'tasks={penalties:[1,640]}'

Killed at any moment, the same command goes on where it was: a search that has ended is only read.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import (
    listed_names,
    positive_number,
    switch,
    text,
    thread_count,
    whole_number,
)
from experiments.common.configuration.reads import Reads, check_settings_are_read
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.results.line_styles import line_styles
from experiments.common.results.reporting import hardware, versions, write_results
from experiments.common.results.result_page import table, write_figures
from experiments.common.runs.run_folder import read_results
from experiments.common.search.budget import spend
from experiments.common.search.search_methods import METHODS
from experiments.common.search.search_tasks import SearchTask
from experiments.sized_tasks import SIZED
from hypertorch.search.gradient_bayes import MAX_DIMENSION

MAIN_CONFIG = CONFIGS / "search_against_gradients.yaml"
failures = Failures(MAIN_CONFIG)
_PICTURE = "search_against_gradients.png"
_LABELS = {
    "random": "random search",
    "TPE": "TPE (Optuna)",
    "Adam": "hypergradient descent (Adam)",
    "gradients": "Gaussian process on values and hypergradients",
}
_TITLES = {
    "penalties": "penalties: L2 of softmax regression",
    "schedules": "schedules: learning rates of a net",
    "weights": "weights: of scans, some mislabelled",
}
_LOSSES = {"validation": "validation loss of the best found", "test": "test loss of that choice"}
_NAMES = {"random": "random", "TPE": "TPE", "Adam": "Adam", "gradients": "GP"}
_UNSURE = {"alpha": 0.35, "hatch": "///"}
# Losses so near to the least are taken for as good.
_EQUAL = 1.01
_HEADINGS = ("problem", "hyperparameters", "search", "evaluations", "validation loss", "test loss", "least mean")


@dataclass(frozen=True, kw_only=True)
class AgainstSettings:
    """What the command reads, beside its table of tasks.

    Args:
        cells: folder of what was run.
        page: folder of the page.
        run: whether what is missing is run.
        threads: of PyTorch's operations.
        budget: of each search (unit: CPU seconds).
        seeds: from 0.
        methods: the searches.
        resume: nothing beside the cells is resumed.
    """

    cells: str = setting(text)
    page: str = setting(text)
    run: bool = setting(switch)
    threads: int = setting(thread_count)
    budget: float = setting(partial(positive_number, purpose="a search takes time", example=4.0))
    seeds: int = setting(partial(whole_number, minimum=1, purpose="a mean needs a search"))
    methods: list[str] | None = setting(partial(listed_names, example="random"))
    resume: bool = setting(switch)


_READS = Reads(settings=(AgainstSettings,), entries=("tasks.*",))


@dataclass(frozen=True, kw_only=True)
class AgainstCell:
    """One search of one task with one seed.

    Args:
        task: name of the problem.
        size: number of hyperparameters.
        method: name of the search.
        seed: of the data and of the search.
        budget: its time (unit: CPU seconds).
        file: where its figures are.
    """

    task: str
    size: int
    method: str
    seed: int
    budget: float
    file: Path

    def run(self) -> None:
        """Searches, judges the choice on the test images, and writes both.

        Raises:
            ExpectedFailure: if no evaluation ended in the time.
        """
        task = SIZED[self.task][1](self.size, self.seed)
        search, method = task.search_task(), METHODS[self.method]
        # What is done once in a process is none of the search: imports, and checks of a kind of problem.
        assert search.start is not None
        search.evaluate(search.start, method.with_gradients)
        _warm_up(self.method)
        began = time.process_time()
        spent = spend(method, search, self.seed, budget=self.budget)
        seconds = time.process_time() - began
        best = spent.best
        figures = {
            "budget": self.budget,
            "evaluations": len(spent.values),
            "first": spent.values[0],
            "validation": spent.values[best],
            "seconds_to_best": spent.seconds[best],
            "test": task.test_loss(spent.points[best]),
            "cpu_seconds": seconds,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_results(self.file, {**figures, "hardware": hardware(torch.device("cpu")), "versions": versions()})

    @cached_property
    def figures(self) -> dict[str, Any]:
        """What the file holds.

        Raises:
            ExpectedFailure: if it is of another budget.
        """
        found = read_results(self.file)
        if found["budget"] != self.budget:
            raise ExpectedFailure(
                f"`cells` has {str(self.file)!r} of a search with budget={found['budget']:g}, where {self.budget:g} is "
                "asked for. Give another folder with cells=..., or delete the file."
            )
        return found


Group = tuple[str, int, str]
"""Problem, number of hyperparameters, search."""


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Runs what is missing, and writes the page."""
    check_settings_are_read(config, _READS)
    own = parse(AgainstSettings, config)
    torch.set_num_threads(own.threads)
    console = Console()
    cells = list(planned_cells(config))
    for cell in cells:
        if own.run and not cell.file.is_file():
            console.print(f"{cell.task}, {cell.size}, {cell.method}, seed {cell.seed}", highlight=False)
            cell.run()
    groups = by_group([cell for cell in cells if cell.file.is_file()])
    if not groups:
        raise ExpectedFailure(f"`cells` is {own.cells!r}, which has no search, and run=false runs none. Leave it out.")
    page = Path(own.page) / "README.md"
    write_figures(page, "experiments/search_against_gradients.py", lines(groups))
    plot(groups, page.with_name(_PICTURE))
    console.print(f"{page}", markup=False, highlight=False, soft_wrap=True)


def planned_cells(config: DictConfig) -> Iterator[AgainstCell]:
    """Yields the cells in the order in which they are run: all searches of a problem, seed by seed.

    Raises:
        ExpectedFailure: if a problem, a number of hyperparameters or a search is not known.
    """
    own = parse(AgainstSettings, config)
    methods = own.methods or list(_LABELS)
    unknown = [name for name in methods if name not in _LABELS]
    if unknown:
        raise ExpectedFailure(f"`methods` names {unknown[0]!r}, which is no search here. Choose of {list(_LABELS)}.")
    for task, sizes in config.tasks.items():
        if task not in SIZED:
            raise ExpectedFailure(f"`tasks` names {task!r}, which is no problem. Choose of {list(SIZED)}.")
        given = OmegaConf.to_container(sizes) if OmegaConf.is_list(sizes) else sizes
        if not isinstance(given, list) or not given or not set(given) <= set(SIZED[str(task)][0]):
            raise ExpectedFailure(
                f"`tasks.{task}` is {given!r}, but its hyperparameters are shared so that there are "
                f"{list(SIZED[str(task)][0])}. Give a list of these."
            )
        for seed in range(own.seeds):
            for size in given:
                for method in methods:
                    if method == "gradients" and size > MAX_DIMENSION:
                        continue
                    file = Path(own.cells) / f"{task}-{size}-{method}-{seed}.json"
                    yield AgainstCell(task=str(task), size=size, method=method, seed=seed, budget=own.budget, file=file)


@cache
def _warm_up(method: str) -> None:
    def bowl(point: torch.Tensor, with_gradient: bool) -> tuple[float, torch.Tensor | None]:
        return float((point - 0.3).square().sum()), 2.0 * (point - 0.3) if with_gradient else None

    # Seven evaluations: enough that a Gaussian process is fitted.
    METHODS[method].run(SearchTask(dimension=2, evaluate=bowl, least=0.0), 7, 0)


def by_group(cells: Sequence[AgainstCell]) -> dict[Group, list[AgainstCell]]:
    """Returns the cells of each problem, number of hyperparameters and search."""
    groups: dict[Group, list[AgainstCell]] = {}
    for cell in sorted(cells, key=lambda cell: (list(SIZED).index(cell.task), cell.size)):
        groups.setdefault((cell.task, cell.size, cell.method), []).append(cell)
    return groups


def leaders(groups: dict[Group, list[AgainstCell]], task: str, size: int, loss: str) -> tuple[list[str], bool]:
    """Returns the searches whose mean loss is the least, within a hundredth, and whether one alone is so in every seed.

    Args:
        groups: the cells.
        task: name of the problem.
        size: number of hyperparameters.
        loss: "validation" or "test".
    """
    found = {
        method: {cell.seed: float(cell.figures[loss]) for cell in cells}
        for (name, number, method), cells in groups.items()
        if (name, number) == (task, size)
    }
    every = [_near_least(losses) for losses in _by_seed(found)]
    best = _near_least({method: statistics.fmean(losses.values()) for method, losses in found.items()})
    return best, len(best) == 1 and all(own == best for own in every)


def _by_seed(found: dict[str, dict[int, float]]) -> list[dict[str, float]]:
    shared = set.intersection(*(set(losses) for losses in found.values()))
    return [{method: losses[seed] for method, losses in found.items()} for seed in sorted(shared)]


def _near_least(losses: dict[str, float]) -> list[str]:
    least = min(losses.values())
    return [method for method, loss in losses.items() if loss <= _EQUAL * least]


def lines(groups: dict[Group, list[AgainstCell]]) -> list[str]:
    """Returns what the page says: a table, its caption and the picture."""
    rows = []
    for (task, size, method), cells in groups.items():
        best = [loss for loss in _LOSSES if method in leaders(groups, task, size, loss)[0]]
        rows.append(
            [
                task,
                str(size),
                _LABELS[method],
                f"{statistics.median(cell.figures['evaluations'] for cell in cells):g}",
                *(_spread([cell.figures[loss] for cell in cells]) for loss in _LOSSES),
                ", ".join(best),
            ]
        )
    cells = [cell for group in groups.values() for cell in group]
    seeds = sorted({cell.seed for cell in cells})
    spent = sum(cell.figures["cpu_seconds"] for cell in cells)
    return [
        *table(_HEADINGS, rows),
        "",
        f"Mean ± standard deviation over the seeds {', '.join(map(str, seeds))}; the number of evaluations is the "
        f"median. Each search had {cells[0].budget:g} CPU seconds; all of them together took {spent:.0f} "
        f"({cells[0].figures['hardware']}, PyTorch {cells[0].figures['versions']['torch']}). `least mean`: "
        "of which losses the search has the least mean, or one within 1 % of it.",
        "",
        f"![losses by the number of hyperparameters, and which search has the least]({_PICTURE})",
        "",
    ]


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def plot(groups: dict[Group, list[AgainstCell]], path: Path) -> None:
    """Draws the losses by the number of hyperparameters, a column for each problem, and below who has the least.

    Args:
        groups: the cells.
        path: the picture.
    """
    tasks = list(dict.fromkeys(task for task, _, _ in groups))
    methods = [method for method in _LABELS if any(method == own for _, _, own in groups)]
    styles = line_styles(_LABELS)
    figure = Figure(figsize=(4.3 * len(tasks) + 0.5, 8.2), layout="constrained")
    grid = figure.subplots(3, len(tasks), sharex="col", squeeze=False, height_ratios=[1.0, 1.0, 0.34])
    cells = [cell for group in groups.values() for cell in group]
    for column, task in enumerate(tasks):
        for axes, (loss, label) in zip(grid[:, column], _LOSSES.items(), strict=False):
            for method in methods:
                own = {size: group for (name, size, by), group in groups.items() if (name, by) == (task, method)}
                losses = [[cell.figures[loss] for cell in group] for group in own.values()]
                means = [statistics.fmean(values) for values in losses]
                # Where the markers of all searches would hide each other, they stand side by side.
                shift = 1.0 + 0.09 * (methods.index(method) - (len(methods) - 1) / 2)
                places = [size * shift for size in own]
                axes.plot(places, means, label=_LABELS[method], **{**styles[method], "markersize": 7})
                low, high = [min(values) for values in losses], [max(values) for values in losses]
                axes.vlines(places, low, high, color=styles[method]["color"], linewidth=1.2)
            if loss == "validation":
                first = statistics.fmean(cell.figures["first"] for cell in cells if cell.task == task)
                axes.axhline(first, color="black", linestyle=":", linewidth=1, label="at the first values")
            axes.set(xscale="log", yscale="log")
            bottom, top = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if top > 8 * bottom else MaxNLocator(5))
            axes.yaxis.set_major_formatter("{x:.3g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.tick_params(axis="y", labelsize=9)
            axes.grid(alpha=0.25)
            if column == 0:
                axes.set_ylabel(label)
        sizes = list(dict.fromkeys(size for name, size, _ in groups if name == task))
        grid[0, column].set_title(_TITLES[task], fontsize=11)
        _strip(grid[2, column], groups, task, sizes)
        if column == 0:
            grid[2, column].set_yticks([0.5, 1.5], ["least test loss", "least validation loss"])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles += [Patch(facecolor="0.5"), Patch(facecolor="0.5", **_UNSURE), Patch(facecolor="0.9")]
    labels += [
        "strip: the least by over 1 % in every seed",
        "strip: the least by over 1 % in the mean alone",
        "strip: the least, equal within 1 % in the mean",
    ]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    seeds = len({cell.seed for cell in cells})
    figure.suptitle(
        f"What each search finds in {cells[0].budget:g} CPU seconds, its own computing included "
        f"(mean, least and greatest of {seeds} seeds)"
    )
    figure.savefig(path, dpi=80)


def _strip(axes: Axes, groups: dict[Group, list[AgainstCell]], task: str, sizes: Sequence[int]) -> None:
    """Draws which searches have the least mean loss for each number of hyperparameters, as a row for each loss."""
    inner = [math.sqrt(low * high) for low, high in pairwise(sizes)]
    edges = [sizes[0] / 2.2, *inner, sizes[-1] * 2.2]
    styles = line_styles(_LABELS)
    for row, loss in enumerate(reversed(_LOSSES)):
        for position, size in enumerate(sizes):
            best, in_every_seed = leaders(groups, task, size, loss)
            left, right = edges[position], edges[position + 1]
            look: dict[str, Any] = {"facecolor": "0.9"}
            if len(best) == 1:
                look = {"facecolor": styles[best[0]]["color"], **({} if in_every_seed else _UNSURE)}
            axes.add_patch(Rectangle((left, row), right - left, 1.0, edgecolor="white", linewidth=1.5, **look))
            names = [_NAMES[method] for method in best]
            axes.text(
                math.sqrt(left * right),
                row + 0.5,
                "\n".join(", ".join(names[start : start + 2]) for start in range(0, len(names), 2)),
                ha="center",
                va="center",
                fontsize=9 if len(names) == 1 else 7.5,
                color="white" if in_every_seed else "black",
            )
    axes.set(xscale="log", xlim=(edges[0], edges[-1]), ylim=(0, 2), xlabel="number of hyperparameters", yticks=[])
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
