"""Runs the experiments with several seeds each, and writes their figures and pictures into their pages of results.

python experiments/gallery.py data=path/to/data
python experiments/gallery.py data=path/to/data 'experiments=[rotation]'

Killed at any moment, the same command goes on where it was: a finished run is only read.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import listed_names, text
from experiments.common.configuration.reads import Reads, check_settings_are_read
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.results.result_page import table, write_figures
from experiments.common.runs.cells import Cell, CellSettings, run_cells
from experiments.common.runs.experiment import experiment_class
from experiments.common.runs.run_folder import RunFolder, command, read_config

MAIN_CONFIG = CONFIGS / "gallery.yaml"
failures = Failures(MAIN_CONFIG)
_LEARNT = "learnt"


@dataclass(frozen=True, kw_only=True)
class GallerySettings(CellSettings):
    """What the command reads, beside what it keeps in tables of its configuration.

    Args:
        pages: folder that has, or is to have, a folder with a page for every experiment.
        experiments: names of the experiments to run; None for all.
    """

    pages: str = setting(text)
    experiments: list[str] | None = setting(partial(listed_names, example="rotation"))


_READS = Reads(settings=(GallerySettings,), entries=("known.*.*", "known.*.variants.*"))


@dataclass(frozen=True, kw_only=True)
class SeedCell(Cell):
    """One variant of an experiment with one seed.

    Args:
        experiment: name of the experiment.
        variant: what differs from its other variants.
        seed: of the run.
        pictures: their names in the run's folder.
    """

    experiment: str
    variant: str
    seed: int
    pictures: tuple[str, ...]


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Runs what is missing and writes the page of an experiment after each of its runs."""
    check_settings_are_read(config, _READS)
    own = parse(GallerySettings, config)
    cells = list(planned_cells(config))
    console = Console()

    def write(name: str) -> None:
        runs = [cell for cell in cells if cell.experiment == name]
        write_page(Path(own.pages) / name, runs, own.data, trusted=own.trust)

    run_cells(cells, own, failures, console, lambda cell: write(cell.experiment))
    for name in dict.fromkeys(cell.experiment for cell in cells):
        write(name)
        console.print(f"{Path(own.pages) / name / 'README.md'}", highlight=False, soft_wrap=True)


def planned_cells(config: DictConfig) -> Iterator[SeedCell]:
    """Yields the runs in the order of the pages.

    Raises:
        ExpectedFailure: if an experiment is unknown, or there is no data to run on.
    """
    own = parse(GallerySettings, config)
    chosen = own.experiments or list(config.known)
    for name in chosen:
        if name not in config.known:
            raise ExpectedFailure(
                f"`experiments` names {name!r}, which is not among {list(config.known)}. Choose of these, or add it: "
                f"'+known.{name}={{seeds:[0],pictures:[],variants:{{small:[\"experiment={name}\"]}}}}'."
            )
    if "${data}" in str([OmegaConf.to_container(config.known[name]) for name in chosen]):
        own.check_data(("mnist", "omniglot", "cifar100"))
    if own.data is None:
        config.data = "..."  # as the commands of the pages have it
    for name in chosen:
        known: dict[str, Any] = OmegaConf.to_container(config.known[name], resolve=True)  # type: ignore[assignment]
        for variant, overrides in known["variants"].items():
            for seed in known["seeds"]:
                yield SeedCell(
                    name=f"{name}, {variant}, seed {seed}",
                    experiment=name,
                    variant=variant,
                    seed=seed,
                    pictures=tuple(known["pictures"]),
                    overrides=(*overrides, f"seed={seed}", *own.overrides),
                    folder=RunFolder(Path(own.cells).resolve() / f"{name}-{variant}-seed{seed}"),
                )


def write_page(folder: Path, cells: Sequence[SeedCell], data: str | None, *, trusted: Sequence[str] = ()) -> None:
    """Writes the figures of an experiment into its page, between two marks, and its pictures beside it.

    What stands outside of the marks stays as it is; a page that is not there is made.

    Args:
        folder: of the page.
        cells: its runs.
        data: the folder of data sets, left out of the commands shown.
        trusted: packages whose classes the runs may name.

    Raises:
        ExpectedFailure: if the page has no marks.
    """
    variants = dict.fromkeys(cell.variant for cell in cells)
    lines: list[str] = []
    for variant in variants:
        runs = [cell for cell in cells if cell.variant == variant]
        done = [cell for cell in runs if cell.is_finished()]
        lines += [f"### {variant}", ""] if len(variants) > 1 else []
        lines += [f"    {_command(runs[0], data)}", ""]
        missing = [str(cell.seed) for cell in runs if cell not in done]
        lines += [f"Not run: seed {', '.join(missing)}.", ""] if missing else []
        if done:
            lines += [*_figures(done), "", *_published(done[0], trusted)]
            lines += _pictures(done, folder)
    write_figures(folder / "README.md", "experiments/gallery.py", lines)


def _command(cell: SeedCell, data: str | None) -> str:
    """Returns the command of one seed, with the folder of data sets as three dots."""
    shown = [word.replace(str(data), "...") if data else word for word in cell.overrides]
    return command("scripts/train", shown)


def _figures(done: Sequence[SeedCell]) -> list[str]:
    """Returns two tables: mean and standard deviation over the seeds of every row, and the learnt rows seed by seed."""
    results = [cell.read() for cell in done]
    names = list(dict.fromkeys(name for splits in results[0]["metrics"].values() for name in splits))
    judged = {_LEARNT: [own["metrics"] for own in results]}
    for name in results[0]["baselines"]:
        judged[name] = [own["baselines"][name] for own in results]
    rows = [
        [
            split,
            what,
            *(_spread(name, [own[split][name]["mean"] for own in runs if name in own[split]]) for name in names),
        ]
        for split in results[0]["metrics"]
        for what, runs in judged.items()
        if split in runs[0]
    ]
    last = list(results[0]["metrics"])[-1]
    seeds = [
        [
            str(cell.seed),
            *(_figure(name, own["metrics"][last][name]["mean"]) for name in names),
            "" if own["cpu_seconds"] is None else f"{own['cpu_seconds']:.0f}",
        ]
        for cell, own in zip(done, results, strict=True)
    ]
    # Of a run that was interrupted it is not known.
    known = [own["cpu_seconds"] for own in results if own["cpu_seconds"] is not None]
    spent = f"; {_spread('', known, digits=0)} CPU seconds each, baselines included" if known else ""
    runs = f"seeds {', '.join(str(cell.seed) for cell in done)}" if len(done) > 1 else f"seed {done[0].seed} alone"
    where = f"{results[0].get('hardware', results[0]['device'])}, {results[0]['torch_threads']} thread(s)"
    return [
        *table(["split", "", *(_heading(name) for name in names)], rows),
        "",
        f"Mean ± standard deviation over {runs}{spent} ({where}).",
        "",
        *_gains(results, last, names[0]),
        *table([f"seed, on {last}", *(_heading(name) for name in names), "CPU seconds"], seeds),
    ]


def _gains(results: Sequence[dict[str, Any]], split: str, name: str) -> list[str]:
    """Returns how much more than each baseline was reached in the same run: what the runs share drops out."""
    gains = []
    for baseline in results[0]["baselines"]:
        runs = [own for own in results if name in own["baselines"][baseline].get(split, {})]
        differences = [
            own["metrics"][split][name]["mean"] - own["baselines"][baseline][split][name]["mean"] for own in runs
        ]
        gains += [f"{baseline} {_spread(name, differences, sign='+')}"] if len(differences) > 1 else []
    if not gains:
        return []
    return [f"Learnt minus the baseline of the same run, {_heading(name)} on {split}: {'; '.join(gains)}.", ""]


def _published(cell: SeedCell, trusted: Sequence[str]) -> list[str]:
    """Returns what others report of the experiment, which its class says."""
    config = read_config(cell.folder.path, setting="cells", trusted=trusted)
    found = experiment_class(config).published
    return [*(f"- Published, {what}: {figures}." for what, figures in found.items()), ""] if found else []


def _pictures(done: Sequence[SeedCell], folder: Path) -> list[str]:
    """Copies the pictures of the first seed beside the page, and returns the lines that show them."""
    first = done[0]
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for name in first.pictures:
        shown = folder / f"{first.variant}_{name}"
        shutil.copyfile(first.folder.path / name, shown)
        lines += [f"![{first.experiment}, {first.variant}, seed {first.seed}]({shown.name})", ""]
    return lines


def _heading(name: str) -> str:
    return f"{name} (%)" if _is_share(name) else name


def _is_share(name: str) -> bool:
    return name.endswith("accuracy")


def _figure(name: str, value: float, digits: int | None = None, sign: str = "") -> str:
    scale, own = (100.0, 2) if _is_share(name) else (1.0, 4)
    return f"{scale * value:{sign}.{own if digits is None else digits}f}"


def _spread(name: str, values: Sequence[float], digits: int | None = None, sign: str = "") -> str:
    """Returns mean and standard deviation; the mean alone of one value, nothing of none."""
    if not values:
        return ""
    mean = _figure(name, statistics.fmean(values), digits, sign)
    return mean if len(values) < 2 else f"{mean} ± {_figure(name, statistics.stdev(values), digits)}"


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
