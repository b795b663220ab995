"""The folder of a run: which one a command uses, and what says whose it is."""

from __future__ import annotations

import datetime
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.commands.processes import is_first_process, is_restarted, own_folder
from experiments.common.runs.trust import check_plain, check_trusted
from hypertorch.outer.storage.hparams_file import HPARAMS_FILE

_CONFIG = "config.yaml"
_OVERRIDES = "overrides.yaml"
_LARGEST = 2**20  # bytes of a text file; what a run writes is a hundredth of it
_DEEPEST = 32  # blocks within blocks of a configuration; a run's are within five
_RESTORE = "Restore the file, or use another run."
# Settings that may differ between the run that was interrupted and the one that goes on with it: they say where, how
# long and how it is shown, not what is computed.
_FREE = (
    "paths",
    "resume",
    "trust",
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
    "outer_loop.schedule_length",  # which matters through the schedule, whose settings are compared
    "outer_loop.progress",
    "dataset.root",
    "hypergradient.spill_to",  # whether there is one is compared by the run itself
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

    Processes that `torchrun` started again go on with their run. Those beside the first have a folder of their own.

    Args:
        config: the whole configuration, with Hydra's part.

    Raises:
        ExpectedFailure: if `resume` is set and there is no earlier run of the same command.
    """
    if not is_first_process():
        return own_folder()
    check_places(config)
    if config.paths.run_dir is not None:
        return Path(str(config.paths.run_dir))
    runs = Path(str(config.paths.runs))
    new = runs / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if config.resume is not True and not is_restarted():
        return new
    wanted = _identifying(config.hydra.overrides.task)
    for folder in _newest_first(runs):
        if _identifying(_read_overrides(folder)) == wanted:
            return folder
    if is_restarted():  # before the run had a folder
        return new
    raise ExpectedFailure(
        f"`resume` is True, but {str(runs)!r} holds no run of the same command"
        f"{' (' + shlex.join(wanted) + ')' if wanted else ''}: there is nothing to go on with. Give the command as it "
        "was given then, or name the run's folder with paths.run_dir=..., or leave resume=true out to start anew."
    )


def check_places(config: DictConfig) -> None:
    """Refuses names of folders that would put a run elsewhere than they say.

    Raises:
        ExpectedFailure: naming the setting.
    """
    for key in ("log_dir", "runs", "run_dir"):
        place = config.paths[key]
        is_place = isinstance(place, (str, int)) and not isinstance(place, bool) and str(place).strip()
        if not (place is None and key == "run_dir") and (not is_place or "\0" in str(place)):
            raise ExpectedFailure(
                f"`paths.{key}` is {place!r}, which names no folder: the run would lie somewhere else. Write a path, "
                f"such as paths.{key}=outputs."
            )
    name = config.task_name
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ExpectedFailure(
            f"`task_name` is {name!r}, which is not the name of one folder: runs would lie outside of paths.log_dir. "
            "Write a plain name, and paths.log_dir=... to put runs elsewhere."
        )


def current_folder() -> RunFolder:
    """Returns the folder of the current Hydra job, whatever is in it."""
    return RunFolder(Path(HydraConfig.get().runtime.output_dir))


def open_folder(config: DictConfig, overrides: Sequence[str]) -> RunFolder:
    """Returns the folder of the current Hydra job, with the configuration written or, on resuming, compared.

    Args:
        config: the configuration of the job.
        overrides: the command line's settings.

    Raises:
        ExpectedFailure: if a run is there already and is not to be resumed, or it had other settings.
    """
    check_places(config)
    _refuse_unnamed_sweep(config)
    folder = current_folder()
    if not folder.config.exists():
        _refuse_missing(config, folder)
        folder.path.joinpath(_OVERRIDES).write_text(yaml.safe_dump(list(overrides)), encoding="utf-8")
        # Last, and whole: a folder with this file is a run.
        _create_whole(folder.config, OmegaConf.to_yaml(config, resolve=True))
        return folder
    if config.resume is not True and not is_restarted():
        raise ExpectedFailure(
            f"`paths.run_dir` is {str(folder.path)!r}, where there is a run already: its results would be lost. Add "
            "resume=true to go on with it, or name another folder."
        )
    _refuse_changes(config, folder, overrides)
    return RunFolder(folder.path, resumed=True)


def _create_whole(path: Path, text: str) -> None:
    """Writes a new file, whole or not at all; raises a `FileExistsError` if another process has written it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    try:
        # Unlike a rename, a link lets one of two processes with the same folder win.
        os.link(partial, path)
    except FileExistsError as error:
        raise FileExistsError(error.errno, error.strerror, str(path)) from error
    except OSError:  # a file system without links
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_config(path: Path, *, setting: str = "run", trusted: Sequence[str] | None = ()) -> DictConfig:
    """Returns the configuration that a run was started with: plain values, which name no code but what is trusted.

    Args:
        path: the run's folder.
        setting: where the folder is named, for messages.
        trusted: names of packages whose classes it may name beside public ones; None for any: nothing will be built.

    Raises:
        ExpectedFailure: if the folder holds no run, the file is none that a run writes, or it names other classes.
    """
    file = path / _CONFIG
    if not file.exists():
        raise ExpectedFailure(
            f"`{setting}` is {str(path)!r}, where there is no {_CONFIG}: it is not the folder of a run. Name a folder "
            "that experiments/train.py wrote, such as outputs/train/runs/<date>."
        )
    values = _read_yaml(file)
    if not isinstance(values, dict) or not values:
        raise ExpectedFailure(
            f"`{setting}` is {str(path)!r}, whose {_CONFIG} holds no settings: the run cannot be built again. "
            "Restore the file."
        )
    check_plain(values, place=str(file))
    if trusted is not None:
        check_trusted(values, place=str(file), trusted=trusted)
    return OmegaConf.create(values)


def changed_settings(before: DictConfig, now: DictConfig) -> list[str]:
    """Returns the names of the settings that differ, but for those that may between two parts of a run."""
    old, new = (dict(_flat(OmegaConf.to_container(item, resolve=True))) for item in (before, now))
    return [key for key in {**old, **new} if old.get(key) != new.get(key) and not key.startswith(_FREE)]


def read_results(path: Path) -> dict[str, Any]:
    """Returns what a run's results.json holds.

    Args:
        path: the file.

    Raises:
        ExpectedFailure: if it is none that a run writes.
    """
    try:
        results = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ExpectedFailure(f"`{path}` is no JSON ({error}): the figures of the run are lost. {_RESTORE}") from error
    if not isinstance(results, dict):
        raise ExpectedFailure(f"`{path}` holds a {type(results).__name__}, not the figures of a run. {_RESTORE}")
    return results


def read_text(path: Path, *, largest: int = _LARGEST, remedy: str = _RESTORE) -> str:
    """Returns the text of a file in a run's folder.

    Args:
        path: the file.
        largest: more bytes than this are not read.
        remedy: what to do about a file that cannot be read, for the message.

    Raises:
        ExpectedFailure: if it is no file, larger than `largest`, or not in UTF-8.
    """
    if not path.is_file():
        raise ExpectedFailure(f"`{path}` is no file, so it holds nothing of a run. {remedy}")
    size = path.stat().st_size
    if size > largest:
        raise ExpectedFailure(
            f"`{path}` has {size / 2**20:.0f} MiB, more than the {largest / 2**20:.0f} MiB that a run writes: it is "
            f"not read. {remedy}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExpectedFailure(f"`{path}` is no text in UTF-8 ({error}), which a run writes. {remedy}") from error


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
    if not file.exists():
        return []
    overrides = _read_yaml(file)
    if not isinstance(overrides, list) or not all(isinstance(item, str) for item in overrides):
        raise ExpectedFailure(f"`{file}` is no list of settings, which a run writes. {_RESTORE}")
    return overrides


def _read_yaml(path: Path) -> Any:
    """Returns the content of a YAML file as dicts, lists and plain values, without anything that YAML has beside."""
    text = read_text(path)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            # A name for a part of the file lets some lines mean gigabytes, brackets in brackets are read for hours, and
            # a tag asks for a class.
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None or depth > _DEEPEST:
                raise ExpectedFailure(
                    f"`{path}` has a reference, a tag or too many brackets in line {event.start_mark.line + 1}, which "
                    f"no run writes: it was altered. {_RESTORE}"
                )
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExpectedFailure(f"`{path}` is no YAML ({reason}): nothing can be read from it. {_RESTORE}") from error


def _refuse_unnamed_sweep(config: DictConfig) -> None:
    hydra = HydraConfig.get()
    words = (*hydra.overrides.task, *hydra.overrides.hydra)
    named = any(item.startswith(("paths.sweep_dir=", "hydra.sweep.dir=")) for item in words)
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
    # Nothing of the folder's configuration is built: the run goes on with the one that was given.
    old = read_config(folder.path, setting="paths.run_dir", trusted=None)
    named = {item.lstrip("+~").split("=")[0] for item in overrides}
    # A switch that an earlier version did not have, left as it is by default: what that version did.
    changed = [key for key in changed_settings(old, config) if key.split(".")[0] in old or key in named]
    if changed:
        key = changed[0]
        raise ExpectedFailure(
            f"`{key}` is {_value(config, key)!r}, but the run in {str(folder.path)!r} was started with "
            f"{_value(old, key)!r}{f' (and {len(changed) - 1} more settings differ)' if changed[1:] else ''}: it "
            "would not go on as the same run. Give the settings it was started with, or start another run without "
            "resume=true."
        )


def _value(config: DictConfig, key: str) -> object:
    return dict(_flat(OmegaConf.to_container(config, resolve=True))).get(key)


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
