"""Runs (learner x setting) cells one after the other and writes the table beside the published figures.

python experiments/fewshot_table.py data=path/to/data
python experiments/fewshot_table.py data=path/to/data 'learners=[maml,protonet]' 'settings=[omniglot_20way_1shot]'

Killed at any moment, the same command goes on where it was: a finished cell is only read.
"""

from __future__ import annotations

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

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import device, listed_names, seed_number
from experiments.common.configuration.reads import Reads, check_settings_are_read
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.runs.cells import Cell, CellSettings, run_cells, write_rows
from experiments.common.runs.run_folder import RunFolder, command

MAIN_CONFIG = CONFIGS / "fewshot_table.yaml"
failures = Failures(MAIN_CONFIG)


@dataclass(frozen=True, kw_only=True)
class TableSettings(CellSettings):
    """What the command reads, beside what it keeps in tables of its configuration.

    Args:
        seed: of every cell.
        device: of every cell.
        learners: experiments to run; None for all.
        settings: settings to run; None for all.
    """

    seed: int = setting(partial(seed_number, purpose="it chooses the initial weights and the episodes"))
    device: torch.device = setting(device)
    learners: list[str] | None = setting(partial(listed_names, example="maml"))
    settings: list[str] | None = setting(partial(listed_names, example="omniglot_5way_1shot"))


_READS = Reads(settings=(TableSettings,), entries=("known_settings.*", "cell_settings.*.*", "published.*.*"))
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


@dataclass(frozen=True, kw_only=True)
class LearnerCell(Cell):
    """One learner in one setting.

    Args:
        learner: name of the experiment.
        setting: name of the setting.
        published: the figure to compare with; None if there is none.
    """

    learner: str
    setting: str
    published: str | None

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
        results = self.read()
        figures = {split: metrics.get("accuracy") for split, metrics in results["metrics"].items()}
        train, val, test = (figures.get(split) for split in ("meta_train", "meta_val", "meta_test"))
        return {
            "command": self.command_that_ran(results, data) or command_of_cell,
            "accuracy (%)": _accuracy(test),
            "meta-train": _accuracy(train),
            "meta-val": _accuracy(val),
            "gap (train - test)": f"{100 * (train['mean'] - test['mean']):.2f}" if train and test else "",
            "seed": str(results["seed"]),
            "minutes": f"{results['training_minutes']:.0f}",
            "hardware": ", ".join([results.get("hardware", results["device"]), f"{results['torch_threads']} threads"]),
        }


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
    run_cells(cells, own, failures, console, lambda _: write_table(folder, cells, config.data))
    write_table(folder, cells, config.data)
    console.print((folder / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


def planned_cells(config: DictConfig) -> Iterator[LearnerCell]:
    """Yields the cells in the order of the table.

    Raises:
        ExpectedFailure: if a setting is unknown, or there is no data to run on.
    """
    own = parse(TableSettings, config)
    own.check_data(("omniglot", "cifar100"))
    published: Mapping[str, Mapping[str, Any]] = OmegaConf.to_container(config.published)  # type: ignore[assignment]
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
            yield LearnerCell(
                name=f"{learner} in {name}",
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


def write_table(folder: Path, cells: Sequence[LearnerCell], data: str | None) -> None:
    """Writes table.md and table.csv.

    Args:
        folder: where to.
        cells: the rows.
        data: the folder of data sets, left out of the commands shown.
    """
    rows = [cell.row(data) for cell in cells]
    write_rows(folder, _COLUMNS, rows)


def _accuracy(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return NOT_JUDGED
    return f"{100 * figure['mean']:.2f} ± {100 * figure['half_width_95']:.2f}"


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
