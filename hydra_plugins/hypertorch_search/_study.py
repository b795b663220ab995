"""The study of a search: its storage, its trials, and which of them are this process's to run."""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import optuna
import torch
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from hydra_plugins.hypertorch_search._journal import BrokenJournalError, open_journal
from hydra_plugins.hypertorch_search._space import Point, Space
from hypertorch.search.command import Direction
from hypertorch.search.processes import Process

ATTEMPT = "attempt"
"""The attribute of a trial that was begun anew: how often."""

VALUES = "values"
"""The attribute of a trial with several seeds: the value of each that was run."""

_RECORD = "search"
_FOLDER = "folder"
_OWNER = "process"
_SETTLING = 1.0  # seconds between writing one's name on a trial and reading whether it is still there
_BEGUN = 60.0  # seconds within which a trial may lack the name of its process

_Word: TypeAlias = Literal["maximize", "minimize"]
_WORDS: dict[Direction, _Word] = {"max": "maximize", "min": "minimize"}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A trial that this process runs.

    Args:
        number: in the study.
        point: its settings.
        is_taken_up: whether a process that ended has begun it.
    """

    number: int
    point: Point
    is_taken_up: bool


def open_storage(given: str | None, folder: Path) -> BaseStorage:
    """Returns the storage that a setting describes.

    Raises:
        ValueError: if it cannot be used.
    """
    if given == "memory":
        return InMemoryStorage()
    try:
        if given is not None and "://" in given:
            return RDBStorage(given)
        return open_journal(folder / "study.journal" if given is None else Path(given))
    except BrokenJournalError:
        raise
    except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"`hydra.sweeper.storage` is {given!r}, which cannot be used: {str(error).splitlines()[0]}. Write the "
            "file of a journal, the URL of a database such as sqlite:///study.db, or memory."
        ) from error


def storage_shown(given: str | None, folder: Path) -> str:
    """Returns what `optuna-dashboard` takes; "" for a study in memory."""
    if given == "memory":
        return ""
    return str(folder / "study.journal") if given is None else given


class Studied:
    """A study, and what this process does in it.

    Args:
        study: the study.
        storage: where it is.
        process: this process.
        space: what trials draw from.
    """

    def __init__(self, study: optuna.Study, storage: BaseStorage, process: Process, space: Space) -> None:
        self.study = study
        self.storage = storage
        self.process = process
        self.space = space

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Returns the trials in some states; all without one."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def draw(self) -> Drawn:
        """Returns a new trial."""
        with _quiet():
            trial = self.study.ask()
            trial.set_user_attr(_OWNER, self.process.name)
            return Drawn(number=trial.number, point=self.space.suggest(trial), is_taken_up=False)

    def enqueue(self, points: Sequence[Point]) -> None:
        """Lets points wait in the study, but for those that it has already."""
        with _quiet():
            for point in points:
                self.study.enqueue_trial(point, skip_if_exists=True)

    def draw_waiting(self) -> Drawn | None:
        """Returns a trial that waits in the study; None if there is none."""
        if not self.trials(TrialState.WAITING):
            return None
        drawn = self.draw()
        if "fixed_params" in self.trials()[drawn.number].system_attrs:
            return drawn
        self.fail(drawn.number, "another process took the last point of the grid")
        return None

    def take_up(self, most: int) -> list[Drawn]:
        """Returns trials that a process has begun which ended since, now this process's.

        Args:
            most: how many at most.
        """
        left = [trial for trial in self.trials(TrialState.RUNNING) if self._is_left(trial)][:most]
        for trial in left:
            self.note(trial.number, _OWNER, self.process.name)
        if left and self.process.others():
            time.sleep(_SETTLING)
        mine = [trial.number for trial in left if self.attribute(trial.number, _OWNER) == self.process.name]
        return [self._taken(number) for number in mine]

    def note(self, number: int, name: str, value: Any) -> None:
        """Writes an attribute of a trial."""
        self.storage.set_trial_user_attr(self._id(number), name, value)

    def attribute(self, number: int, name: str, default: Any = None) -> Any:
        """Returns an attribute of a trial."""
        return self.storage.get_trial_user_attrs(self._id(number)).get(name, default)

    def report(self, number: int, step: int, value: float) -> None:
        """Writes the value that a trial has reached."""
        self.storage.set_trial_intermediate_value(self._id(number), step, value)

    def complete(self, number: int, values: Sequence[float]) -> None:
        """Ends a trial with its values."""
        with _quiet():
            self.study.tell(number, list(values))

    def prune(self, number: int) -> None:
        """Ends a trial early, with the value that it reported last."""
        with _quiet():
            self.study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, why: str) -> None:
        """Ends a trial without a value."""
        self.note(number, "why", why)
        with _quiet():
            self.study.tell(number, state=TrialState.FAIL)

    def _is_left(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get(_OWNER)
        if owner is not None:
            return not self.process.is_alive(owner)
        # A process writes its name right after it has begun a trial: killed in between, it leaves one without.
        begun = trial.datetime_start
        return not self.process.others() or begun is None or time.time() - begun.timestamp() > _BEGUN

    def _taken(self, number: int) -> Drawn:
        with _quiet():
            point = self.space.suggest(Trial(self.study, self._id(number)))
        return Drawn(number=number, point=point, is_taken_up=True)

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)


def open_study(
    storage: BaseStorage, name: str, directions: Sequence[Direction], record: Mapping[str, Any]
) -> tuple[optuna.Study, bool]:
    """Returns a study, and whether it is new.

    Args:
        storage: where it is.
        name: its name there.
        directions: of its objectives.
        record: what all its processes must agree on.

    Raises:
        ValueError: naming what this process and the study do not agree on.
    """
    words: list[_Word] = [_WORDS[direction] for direction in directions]
    with _quiet():
        study = optuna.create_study(storage=storage, study_name=name, directions=words, load_if_exists=True)
    before = study.user_attrs.get(_RECORD)
    wanted = {**record, "directions": list(directions)}
    for key, value in wanted.items():
        if before is not None and before.get(key) != value:
            raise ValueError(
                f"`hydra.sweeper.storage` has a study {name!r} whose {key} is {before.get(key)}, here {value}: "
                "its trials would not be of one search. Give the settings of that search, or another "
                "hydra.sweeper.study_name or storage."
            )
    found = [direction.name.lower() for direction in study.directions]
    if found != words:
        raise ValueError(
            f"`hydra.sweeper.storage` has a study {name!r} that is to {' and '.join(found)}, here "
            f"{' and '.join(words)}. Give another hydra.sweeper.study_name or storage."
        )
    return study, before is None


def begin(study: optuna.Study, directions: Sequence[Direction], record: Mapping[str, Any]) -> None:
    """Writes what the processes of a study must agree on, once nothing is left to be refused."""
    study.set_user_attr(_RECORD, {**record, "directions": list(directions)})


def folder_of(study: optuna.Study, folder: Path, *, is_named: bool) -> Path:
    """Returns where the trials of a study have their folders.

    Args:
        study: the study.
        folder: where this process would have them.
        is_named: whether the command names that folder.
    """
    known = study.user_attrs.get(_FOLDER)
    if known is not None and not is_named:
        return Path(known)
    if known is None:
        study.set_user_attr(_FOLDER, str(folder))
    return folder


def seed_of(seed: int, process: Process) -> int:
    """Returns the seed of the sampler: of a process that joins a study, one of its own, or it drew the same points.

    Args:
        seed: of the search.
        process: the process.
    """
    if process.is_first():
        return seed
    return int(np.random.SeedSequence([seed, zlib.crc32(process.name.encode())]).generate_state(1)[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's messages for every trial, and on one thread, which its Gaussian processes are faster on."""
    threads, level = torch.get_num_threads(), optuna.logging.get_verbosity()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        torch.set_num_threads(threads)
        optuna.logging.set_verbosity(level)
