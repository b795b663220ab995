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
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.common.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.common.config_errors import CONFIGS
from experiments.common.failures import ExpectedFailure, Failures
from experiments.common.reads import Reads, check_settings_are_read
from experiments.common.run_folder import RunFolder, command, read_config, read_results
from experiments.common.settings import listed_names, trusted_packages, whole_number

MAIN_CONFIG = CONFIGS / "fewshot_table.yaml"
failures = Failures(MAIN_CONFIG)
_READS = Reads(main_config=MAIN_CONFIG, entries=("known_settings.*", "cell_settings.*.*", "published.*.*"))
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
    if config.data is None and not config.run:
        config.data = "..."  # as the commands of the table have it
    cells = list(planned_cells(config))
    console = Console()
    folder = Path(str(config.cells)).parent
    trusted = trusted_packages(config)
    for cell in cells:
        cell.check_folder(trusted)
    for cell in cells if config.run else ():
        if cell.is_finished():
            cell.check_command()
    for cell in cells if config.run else ():
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
    if config.run and config.data is None:
        raise ExpectedFailure(
            "`data` is not given, so there is nothing to train on. Pass data=... the folder that has `omniglot` and "
            "`cifar100`, or run=false to write the table of what was run."
        )
    published: Mapping[str, Mapping[str, Any]] = OmegaConf.to_container(config.published)  # type: ignore[assignment]
    if config.run and not Path(str(config.data)).is_dir():
        raise ExpectedFailure(
            f"`data` is {str(config.data)!r}, which is no folder: there is nothing to train on. Pass the folder that "
            "has `omniglot` and `cifar100`."
        )
    whole_number(config, "seed", minimum=0, purpose="it chooses the initial weights and the episodes")
    learners = listed_names(config, "learners", example="maml") or list(published)
    settings = listed_names(config, "settings", example="omniglot_5way_1shot") or list(config.known_settings)
    experiments = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    for learner in learners:
        if learner not in experiments:
            raise ExpectedFailure(
                f"`learners` names {learner!r}, which is no experiment, so there is nothing to run. Choose of these: "
                f"{experiments}."
            )
    for setting in settings:
        if setting not in config.known_settings:
            raise ExpectedFailure(
                f"`settings` names {setting!r}, which is not among {list(config.known_settings)}. Choose of these, or "
                f"add it: '+known_settings.{setting}=[...]'."
            )
        for learner in learners:
            figure = published.get(learner, {}).get(setting)
            yield Cell(
                learner=learner,
                setting=setting,
                overrides=(
                    f"experiment={learner}",
                    *config.known_settings[setting],
                    *config.cell_settings.get(learner, {}).get(setting, []),
                    f"seed={config.seed}",
                    f"device={config.device}",
                    *config.overrides,
                ),
                folder=RunFolder(Path(str(config.cells)).resolve() / f"{learner}-{setting}-seed{config.seed}"),
                published=None if figure is None else str(figure),
            )


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
