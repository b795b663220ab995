"""The folder of a run: which one a command uses, and what says whose it is."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.failures import ExpectedFailure
from hypertorch.outer.hparams_file import HPARAMS_FILE

_CONFIG = "config.yaml"
_OVERRIDES = "overrides.yaml"
# Settings that may differ between the run that was interrupted and the one that goes on with it: they say where, how
# long and how it is shown, not what is computed.
_FREE = (
    "paths",
    "resume",
    "device",
    "threads",
    "evaluation.splits",
    "evaluation.num_episodes",
    "pictures",
    "only",
    "repetitions",
    "shortest_repetition",
    "longest_timing",
    "outer_loop.num_outer_steps",
    "outer_loop.progress",
    "dataset.root",
)
_FREE_OVERRIDES = (
    "resume=", "only=", "repetitions=", "shortest_repetition=", "longest_timing=", "paths.", "hydra.",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and the files in it.

    Args:
        path: the folder.
        resumed: whether it held a run before.
    """

    path: Path
    resumed: bool = False

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / _CONFIG

    @property
    def metrics(self) -> Path:
        """One line of JSON for every logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def hparams(self) -> Path:
        """The best outer variables, where the outer loop writes them."""
        return self.checkpoints / HPARAMS_FILE

    @property
    def results(self) -> Path:
        """The final figures."""
        return self.path / "results.json"


def choose_folder(config: DictConfig) -> Path:
    """Returns the folder for a single run: the given one, the one to resume, or a new one named by the date.

    Args:
        config: the whole configuration, with Hydra's part.

    Raises:
        ExpectedFailure: if `resume` is set and there is no earlier run of the same command.
    """
    if config.paths.run_dir is not None:
        return Path(str(config.paths.run_dir))
    runs = Path(str(config.paths.runs))
    if config.resume is not True:
        return runs / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    wanted = _identifying(config.hydra.overrides.task)
    for folder in _newest_first(runs):
        if _identifying(_read_overrides(folder)) == wanted:
            return folder
    raise ExpectedFailure(
        f"`resume` is True, but {str(runs)!r} holds no run of the same command"
        f"{' (' + shlex.join(wanted) + ')' if wanted else ''}: there is nothing to go on with. Give the command as it "
        "was given then, or name the run's folder with paths.run_dir=..., or leave resume=true out to start anew."
    )


def open_folder(config: DictConfig, overrides: Sequence[str]) -> RunFolder:
    """Returns the folder of the current Hydra job, with the configuration written or, on resuming, compared.

    Args:
        config: the configuration of the job.
        overrides: the command line's settings.

    Raises:
        ExpectedFailure: if a run is there already and is not to be resumed, or it had other settings.
    """
    _refuse_unnamed_sweep(config)
    folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
    if not folder.config.exists():
        _refuse_missing(config, folder)
        folder.path.joinpath(_OVERRIDES).write_text(yaml.safe_dump(list(overrides)), encoding="utf-8")
        # Last: a folder with this file is a run. "x" lets one of two processes with the same folder win.
        with folder.config.open("x", encoding="utf-8") as file:
            file.write(OmegaConf.to_yaml(config, resolve=True))
        return folder
    if config.resume is not True:
        raise ExpectedFailure(
            f"`paths.run_dir` is {str(folder.path)!r}, where there is a run already: its results would be lost. Add "
            "resume=true to go on with it, or name another folder."
        )
    _refuse_changes(config, folder, overrides)
    return RunFolder(folder.path, resumed=True)


def read_config(path: Path) -> DictConfig:
    """Returns the configuration that a run was started with.

    Args:
        path: the run's folder.

    Raises:
        ExpectedFailure: if the folder holds no run.
    """
    file = path / _CONFIG
    if not file.is_file():
        raise ExpectedFailure(
            f"`run` is {str(path)!r}, where there is no {_CONFIG}: it is not the folder of a run. Name a folder that "
            "experiments/train.py wrote, such as outputs/train/runs/<date>."
        )
    config = OmegaConf.load(file)
    if not isinstance(config, DictConfig):
        raise ExpectedFailure(
            f"`run` is {str(path)!r}, whose {_CONFIG} holds no settings: the run cannot be built again. "
            "Restore the file."
        )
    return config


def command(program: str, overrides: Sequence[str]) -> str:
    """Returns the command line as one would type it."""
    return shlex.join([*program.split(), *overrides])


def _identifying(overrides: Sequence[str]) -> list[str]:
    """Returns the settings of a command line that make it a command of its own, in a fixed order."""
    return sorted(item for item in overrides if not item.lstrip("+~").startswith(_FREE_OVERRIDES))


def _newest_first(runs: Path) -> list[Path]:
    folders = [path for path in runs.iterdir() if (path / _CONFIG).is_file()] if runs.is_dir() else []
    return sorted(folders, key=lambda path: (path / _CONFIG).stat().st_mtime_ns, reverse=True)


def _read_overrides(folder: Path) -> list[str]:
    file = folder / _OVERRIDES
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else []


def _refuse_unnamed_sweep(config: DictConfig) -> None:
    hydra = HydraConfig.get()
    named = any(item.startswith("paths.sweep_dir=") for item in hydra.overrides.task)
    if config.resume is True and hydra.mode == RunMode.MULTIRUN and not named:
        raise ExpectedFailure(
            "`resume` is True in a multirun whose folder is not given: which of the earlier ones to go on with is not "
            f"known. Name it: paths.sweep_dir={config.paths.log_dir}/{config.task_name}/multiruns/<date>"
        )


def _refuse_missing(config: DictConfig, folder: RunFolder) -> None:
    # A job of an interrupted multirun may not have begun.
    if config.resume is True and HydraConfig.get().mode == RunMode.RUN:
        raise ExpectedFailure(
            f"`paths.run_dir` is {str(folder.path)!r}, where there is no run to go on with. Name the folder of the "
            "interrupted run, or leave resume=true out to start one there."
        )


def _refuse_changes(config: DictConfig, folder: RunFolder, overrides: Sequence[str]) -> None:
    old = read_config(folder.path)
    before, now = (dict(_flat(OmegaConf.to_container(item, resolve=True))) for item in (old, config))
    # A switch that an earlier version did not have, left as it is by default: what that version did.
    named = {item.lstrip("+~").split("=")[0] for item in overrides}
    new = {key for key in now if "." not in key and key not in old and key not in named}
    changed = [
        key
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not key.startswith(_FREE) and key not in new
    ]
    if changed:
        key = changed[0]
        raise ExpectedFailure(
            f"`{key}` is {now.get(key)!r}, but the run in {str(folder.path)!r} was started with {before.get(key)!r}"
            f"{f' (and {len(changed) - 1} more settings differ)' if changed[1:] else ''}: it would not go on as the "
            "same run. Give the settings it was started with, or start another run without resume=true."
        )


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
