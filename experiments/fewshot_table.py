"""Runs (learner x setting) cells one after the other and writes the table beside the published figures.

python experiments/fewshot_table.py data=path/to/data
python experiments/fewshot_table.py data=path/to/data 'learners=[maml,protonet]' 'settings=[omniglot_20way_1shot]'

Killed at any moment, the same command goes on where it was: a finished cell is only read.
"""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.common.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.common.config_errors import CONFIGS
from experiments.common.failures import ExpectedFailure, Failures
from experiments.common.readers import (
    as_given,
    device,
    listed_names,
    optional,
    package_names,
    switch,
    text,
    whole_number,
)
from experiments.common.reads import Reads, check_settings_are_read
from experiments.common.run_folder import RunFolder, command, read_config, read_results
from experiments.common.typed_settings import parse, setting

MAIN_CONFIG = CONFIGS / "fewshot_table.yaml"
failures = Failures(MAIN_CONFIG)


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """What the command reads, beside what it keeps in tables of its configuration.

    Args:
        data: folder of the data sets; None where nothing is run.
        cells: folder of the cells' runs.
        trust: packages whose classes the runs that are there may name.
        seed: of every cell.
        device: of every cell.
        run: whether what is missing is run.
        overrides: further settings of every cell.
        resume: nothing beside the cells is resumed.
        learners: experiments to run; None for all.
        settings: settings to run; None for all.
    """

    data: str | None = setting(optional(text))
    cells: str = setting(text)
    trust: list[str] = setting(package_names)
    seed: int = setting(partial(whole_number, minimum=0, purpose="it chooses the initial weights and the episodes"))
    device: torch.device = setting(device)
    run: bool = setting(switch)
    overrides: list[str] = setting(as_given)
    resume: bool = setting(switch)
    learners: list[str] | None = setting(partial(listed_names, example="maml"))
    settings: list[str] | None = setting(partial(listed_names, example="omniglot_5way_1shot"))


_READS = Reads(settings=(TableSettings,), entries=("known_settings.*", "cell_settings.*.*", "published.*.*"))
_TRAIN = Path(__file__).resolve().parent / "train.py"
_COLUMNS: tuple[str, ...] = (
    "learner",
    "setting",
    "accuracy (%)",
    "published (%)",
    "meta-train",
    "meta-val",
    "gap (train - test)",
    "seed",
    "minutes",
    "hardware",
    "command",
)
NOT_RUN = "not run"
NOT_JUDGED = "not evaluated"
# Settings of a training command that say where and how it runs, not what is computed.
_FREE = ("paths.", "resume=", "device=", "threads=", "dataset.root=", "outer_loop.progress=", "pictures.", "hydra.")
# As in scripts/train, where it is explained.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One learner in one setting.

    Args:
        learner: name of the experiment.
        setting: name of the setting.
        overrides: settings of the training command.
        folder: where its run is.
        published: the figure to compare with; None if there is none.
    """

    learner: str
    setting: str
    overrides: tuple[str, ...]
    folder: RunFolder
    published: str | None

    def is_finished(self) -> bool:
        """Returns whether the cell has its figures."""
        return self.folder.results.is_file()

    def check_folder(self, trusted: Sequence[str]) -> None:
        """Refuses a folder whose configuration names classes that a run's folder may not name.

        Args:
            trusted: packages whose classes it may name too.

        Raises:
            ExpectedFailure: naming them.
        """
        if self.folder.config.exists():
            read_config(self.folder.path, setting="cells", trusted=trusted)

    def check_command(self) -> None:
        """Refuses figures of other settings than those that the cell is to have.

        Raises:
            ExpectedFailure: naming the settings that only one of the two commands has.
        """
        recorded = self._results().get("command")
        if recorded is None:
            return
        was, wanted = _settings(shlex.split(recorded)[1:]), _settings(self.overrides)
        if was != wanted:
            raise ExpectedFailure(
                f"`cells` has a finished run of {self.learner} in {self.setting} that was made by another command: "
                f"{sorted(was - wanted)} there, {sorted(wanted - was)} here, so its figures are not those asked for. "
                f"Give another folder with cells=..., or delete {str(self.folder.path)!r}, or add run=false for the "
                "table of what was run."
            )

    def run(self, data: str) -> None:
        """Trains and evaluates, or goes on with a run that was interrupted.

        Args:
            data: the folder of data sets.

        Raises:
            ExpectedFailure: if the training command failed; it has said why.
        """
        begun = self.folder.config.is_file()
        words = [*self.overrides, f"paths.run_dir={self.folder.path}", *(["resume=true"] if begun else [])]
        done = subprocess.run(
            [sys.executable, str(_TRAIN), *words],
            check=False,
            env={**_KEEP_MEMORY, **failures.environment(), "HYPERTORCH_DATA": data},
        )
        if done.returncode:
            raise ExpectedFailure(
                f"the cell {self.learner} in {self.setting} ended with exit code {done.returncode}: its message is "
                "above. The same command of the table goes on from here once that is mended."
            )

    def row(self, data: str | None) -> dict[str, str]:
        """Returns the cell as a row of the table, with the command that ran; what was not run is said to be not run."""
        shown = [word.replace(str(data), "...") if data else word for word in self.overrides]
        known = {
            "learner": self.learner,
            "setting": self.setting.replace("_", " "),
            "published (%)": self.published or "none known",
            "command": command("scripts/train", shown),
        }
        if not self.is_finished():
            return {**dict.fromkeys(_COLUMNS, ""), **known, "accuracy (%)": NOT_RUN}
        try:
            return {**known, **self._figures(known["command"], data)}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ExpectedFailure(
                f"`{self.folder.results}` is not as a run writes it ({type(error).__name__}: {error}): its figures "
                "cannot be shown. Restore the file, or delete it to run the cell again."
            ) from error

    def _figures(self, command_of_cell: str, data: str | None) -> dict[str, str]:
        results = self._results()
        figures = {split: metrics.get("accuracy") for split, metrics in results["metrics"].items()}
        train, val, test = (figures.get(split) for split in ("meta_train", "meta_val", "meta_test"))
        return {
            "command": self._command_that_ran(results, data) or command_of_cell,
            "accuracy (%)": _accuracy(test),
            "meta-train": _accuracy(train),
            "meta-val": _accuracy(val),
            "gap (train - test)": f"{100 * (train['mean'] - test['mean']):.2f}" if train and test else "",
            "seed": str(results["seed"]),
            "minutes": f"{results['training_minutes']:.0f}",
            "hardware": ", ".join([results.get("hardware", results["device"]), f"{results['torch_threads']} threads"]),
        }

    def _results(self) -> dict[str, Any]:
        return read_results(self.folder.results)

    def _command_that_ran(self, results: Mapping[str, Any], data: str | None) -> str | None:
        """Returns the command of the run itself, without where it lay; None if the run does not say."""
        if "command" not in results:
            return None
        words = [
            word.replace(str(Path(str(data)).resolve()), "...").replace(str(data), "...") if data else word
            for word in shlex.split(results["command"])
        ]
        return shlex.join(word for word in words if not word.startswith(("paths.", "resume=")))


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Runs what is missing and writes the table after every cell."""
    check_settings_are_read(config, _READS)
    own = parse(TableSettings, config)
    if own.data is None and not own.run:
        config.data = "..."  # as the commands of the table have it
    cells = list(planned_cells(config))
    console = Console()
    folder = Path(own.cells).parent
    for cell in cells:
        cell.check_folder(own.trust)
    for cell in cells if own.run else ():
        if cell.is_finished():
            cell.check_command()
    for cell in cells if own.run else ():
        if not cell.is_finished():
            console.print(f"{cell.learner}, {cell.setting}", highlight=False)
            cell.run(str(Path(str(config.data)).resolve()))
            write_table(folder, cells, config.data)
    write_table(folder, cells, config.data)
    console.print((folder / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


def planned_cells(config: DictConfig) -> Iterator[Cell]:
    """Yields the cells in the order of the table.

    Raises:
        ExpectedFailure: if a setting is unknown, or there is no data to run on.
    """
    own = parse(TableSettings, config)
    if own.run and own.data is None:
        raise ExpectedFailure(
            "`data` is not given, so there is nothing to train on. Pass data=... the folder that has `omniglot` and "
            "`cifar100`, or run=false to write the table of what was run."
        )
    published: Mapping[str, Mapping[str, Any]] = OmegaConf.to_container(config.published)  # type: ignore[assignment]
    if own.run and not Path(str(own.data)).is_dir():
        raise ExpectedFailure(
            f"`data` is {own.data!r}, which is no folder: there is nothing to train on. Pass the folder that "
            "has `omniglot` and `cifar100`."
        )
    learners, settings = own.learners or list(published), own.settings or list(config.known_settings)
    experiments = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml") if _is_few_shot(path))
    for learner in learners:
        if learner not in experiments:
            raise ExpectedFailure(
                f"`learners` names {learner!r}, which is no few-shot experiment: there is nothing to run. Choose of "
                f"these: {experiments}."
            )
    for name in settings:
        if name not in config.known_settings:
            raise ExpectedFailure(
                f"`settings` names {name!r}, which is not among {list(config.known_settings)}. Choose of these, or "
                f"add it: '+known_settings.{name}=[...]'."
            )
        for learner in learners:
            figure = published.get(learner, {}).get(name)
            yield Cell(
                learner=learner,
                setting=name,
                overrides=(
                    f"experiment={learner}",
                    *config.known_settings[name],
                    *config.cell_settings.get(learner, {}).get(name, []),
                    f"seed={own.seed}",
                    f"device={config.device}",
                    *own.overrides,
                ),
                folder=RunFolder(Path(own.cells).resolve() / f"{learner}-{name}-seed{own.seed}"),
                published=None if figure is None else str(figure),
            )


def _is_few_shot(path: Path) -> bool:
    return "- /fewshot:" in path.read_text(encoding="utf-8")


def write_table(folder: Path, cells: Sequence[Cell], data: str | None) -> None:
    """Writes table.md and table.csv.

    Args:
        folder: where to.
        cells: the rows.
        data: the folder of data sets, left out of the commands shown.
    """
    rows = [cell.row(data) for cell in cells]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
    lines += [f"| {' | '.join(row[column] for column in _COLUMNS)} |" for row in rows]
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _settings(words: Sequence[str]) -> set[str]:
    return {word for word in words if not word.lstrip("+~").startswith(_FREE)}


def _accuracy(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return NOT_JUDGED
    return f"{100 * figure['mean']:.2f} ± {100 * figure['half_width_95']:.2f}"


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
