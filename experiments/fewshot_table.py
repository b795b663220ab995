"""Runs (learner x setting) cells one after the other and writes the table beside the published figures.

python experiments/fewshot_table.py data=path/to/data
python experiments/fewshot_table.py data=path/to/data 'learners=[maml,protonet]' 'settings=[omniglot_20way_1shot]'

Killed at any moment, the same command goes on where it was: a finished cell is only read.
"""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.config_errors import CONFIGS
from experiments.failures import ExpectedFailure, Failures
from experiments.run_folder import RunFolder, command

failures = Failures("fewshot_table")
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
        """Returns the cell as a row of the table; what was not run is said to be not run."""
        shown = [word.replace(str(data), "...") if data else word for word in self.overrides]
        known = {
            "learner": self.learner,
            "setting": self.setting.replace("_", " "),
            "published (%)": self.published or "none known",
            "command": command("scripts/train", shown),
        }
        if not self.is_finished():
            return {**dict.fromkeys(_COLUMNS, ""), **known, "accuracy (%)": NOT_RUN}
        results = json.loads(self.folder.results.read_text(encoding="utf-8"))
        splits = {split: _accuracy(figures["accuracy"]) for split, figures in results["metrics"].items()}
        return {
            **known,
            "accuracy (%)": splits["meta_test"],
            "meta-train": splits["meta_train"],
            "meta-val": splits["meta_val"],
            "gap (train - test)": f"{_mean(results, 'meta_train') - _mean(results, 'meta_test'):.2f}",
            "seed": str(results["seed"]),
            "minutes": f"{results['training_minutes']:.0f}",
            "hardware": f"{results['device']}, {platform.machine()}, {results['torch_threads']} threads",
        }


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="fewshot_table")
@failures.reported
def main(config: DictConfig) -> None:
    """Runs what is missing and writes the table after every cell."""
    if config.data is None and not config.run:
        config.data = "..."  # as the commands of the table have it
    cells = list(planned_cells(config))
    console = Console()
    folder = Path(str(config.cells)).parent
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
    experiments = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    for learner in config.learners:
        if learner not in experiments:
            raise ExpectedFailure(
                f"`learners` names {learner!r}, which is no experiment, so there is nothing to run. Choose of these: "
                f"{experiments}."
            )
    for setting in config.settings:
        if setting not in config.known_settings:
            raise ExpectedFailure(
                f"`settings` names {setting!r}, which is not among {list(config.known_settings)}. Choose of these, or "
                f"add it: '+known_settings.{setting}=[...]'."
            )
        for learner in config.learners:
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


def _mean(results: Mapping[str, Any], split: str) -> float:
    return 100 * results["metrics"][split]["accuracy"]["mean"]


def _accuracy(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['mean']:.2f} ± {100 * figure['half_width_95']:.2f}"


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
