"""Kills runs, resumes them, and compares what they leave with what an undisturbed run leaves."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import hypertorch as ht
from tests.faults import kills
from tests.faults.runs import Run
from tests.outer.runs import TIMING

_STOPPED = (-9, -15, -2, 130, 143)  # by a signal, or by the handler of one
_INTERRUPTED = "error: interrupted."  # of a command, whose exit code says less
_OF_THE_CLOCK = ("seconds",)
_GROWING = ("events.out.tfevents", ".log")  # a resumed run adds to them


class FaultError(AssertionError):
    """A killed run did not come back as it was."""


@dataclass
class Tally:
    """What was seen of one run under one kind of kill."""

    kills: int = 0
    resumed: int = 0
    same: int = 0
    lost: int = 0
    doubled: int = 0
    leftovers: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Adds another."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: content by file, records by file, and the names of all files."""

    contents: dict[str, Any]
    records: dict[str, Counter[str]]
    names: frozenset[str]


def outcome(folder: Path) -> Outcome:
    """Reads everything that a finished run or search leaves, but for what tells the time."""
    contents: dict[str, Any] = {}
    records: dict[str, Counter[str]] = {}
    names = set()
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or any(word in path.name for word in _GROWING):
            continue
        name = str(path.relative_to(folder))
        names.add(name)
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            records[name] = Counter(
                json.dumps({key: value for key, value in line.items() if key not in TIMING}) for line in lines
            )
        elif path.name.startswith("step_"):
            # The one before the newest is that of an interrupt, where there was one.
            kept = ht.Checkpoints(path.parent).paths()
            if path != kept[-1]:
                names.discard(name)
                names.add(f"{Path(name).parent}, one before the newest: {kept.index(path)}")
                continue
            checkpoint = vars(ht.Checkpoints(path.parent).load(path))
            contents[name] = {key: _plain(value) for key, value in checkpoint.items() if key not in _OF_THE_CLOCK}
        elif path.name == "hparams.safetensors":
            contents[name] = _plain(ht.load_hparams(path))
        elif path.name == "results.json":
            found = json.loads(path.read_text())
            contents[name] = {key: found[key] for key in ("metrics", "baselines", "best_step", "num_outer_steps")}
        elif path.suffix == ".journal":
            contents[name] = _trials(path)
    return Outcome(contents, records, frozenset(names))


def _plain(value: Any) -> Any:
    """Returns a value that compares by bits."""
    if hasattr(value, "numpy"):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


def _trials(path: Path) -> list[Any]:
    study = optuna.load_study(study_name="search", storage=JournalStorage(JournalFileBackend(str(path))))
    return sorted((repr(trial.params), trial.state.name, trial.values) for trial in study.trials)


class Campaign:
    """Kills one run again and again.

    Args:
        run: the run.
        folder: where its folders go; those of the runs that came back as they were are deleted.
        seed: of everything random.
    """

    def __init__(self, run: Run, folder: Path, seed: int) -> None:
        self.run, self._folder = run, folder
        self._random = random.Random(f"{run.name} {seed}")
        self._number = 0
        self._expected, self.seconds = self._undisturbed()

    def _undisturbed(self) -> tuple[Outcome, float]:
        folder = self._folder / "undisturbed"
        child = kills.start(self.run.go_on, folder, self._log("undisturbed"))
        begun = self._begun(child, folder)
        code = kills.exit_code(child)
        seconds = time.monotonic() - begun
        if code:
            raise FaultError(f"{self.run.name}: exit code {code} undisturbed: {self._log('undisturbed').read_text()}")
        return outcome(folder), seconds

    def at_random(self, kind: str, num_kills: int) -> Tally:
        """Kills at random moments, some runs several times, until there were so many kills."""
        tally, last = Tally(), self._number + 20 * num_kills
        while tally.kills < num_kills:
            if self._number == last:
                raise FaultError(f"{self.run.name}: {tally.kills} of {20 * num_kills} runs were killed by {kind}")
            with self._trial(tally) as (folder, log):
                several = min(self._random.choice((1, 1, 2, 3)), num_kills - tally.kills)
                for _ in range(several):
                    child = kills.start(self.run.go_on, folder, log)
                    begun = self._begun(child, folder)
                    code = kills.signal_after(
                        child,
                        self._random.uniform(0.0, self.seconds),
                        kills.KINDS[kind][0],
                        kills.pause_before_the_second(kind, self._random),
                    )
                    if code == 0:  # done before: the machine is faster than it was
                        self.seconds = min(self.seconds, time.monotonic() - begun)
                        break
                    if code not in _STOPPED and not (code == 1 and _INTERRUPTED in log.read_text()[-200:]):
                        raise FaultError(f"exit code {code} after {kind}")
                    tally.kills += 1
        return tally

    def aimed(self, name: str, aims: Sequence[kills.Aim]) -> Tally:
        """Lets each start kill itself at a moment of a kind."""
        tally = Tally()
        with self._trial(tally) as (folder, log):
            for aim in aims:
                nth = (
                    1 if any(word in name for word in kills.ONCE) or self.run.is_command else self._random.randint(1, 9)
                )
                child = kills.start(self.run.go_on, folder, log, partial(aim, nth))
                code = kills.exit_code(child)
                if code != -9:
                    raise FaultError(f"exit code {code} of a process that was to kill itself ({name})")
                tally.kills += 1
        return tally

    @contextmanager
    def _trial(self, tally: Tally) -> Iterator[tuple[Path, Path]]:
        """Gives a new folder and log; then resumes what was killed there to the end, and compares."""
        self._number += 1
        folder, log = self._folder / f"run_{self._number}", self._log(f"run_{self._number}")
        try:
            yield folder, log
            code = kills.exit_code(kills.start(self.run.go_on, folder, log))
            if code:
                raise FaultError(f"exit code {code} of the resumed run")
            tally.resumed += 1
            self._compare(outcome(folder), tally)
        except FaultError as error:
            tally.faults.append(f"{self.run.name}, {folder}: {error}; {log.read_text()[-600:] if log.exists() else ''}")
        else:
            shutil.rmtree(folder)
            log.unlink(missing_ok=True)

    def _compare(self, found: Outcome, tally: Tally) -> None:
        expected, differing = self._expected, []
        for name, records in expected.records.items():
            own = found.records.get(name, Counter())
            tally.lost += (lost := (records - own).total())
            tally.doubled += (doubled := (own - records).total())
            if lost or doubled:
                differing.append(f"{name}: {lost} records lost, {doubled} doubled")
        tally.leftovers += len(found.names - expected.names)
        if found.names != expected.names:
            differing.append(f"files {sorted(found.names ^ expected.names)}")
        contents = [name for name, value in expected.contents.items() if found.contents.get(name) != value]
        tally.same += not contents
        if differing or contents:
            raise FaultError(f"differs in {[*differing, *contents]}")

    def _log(self, name: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{name}.log"

    def _begun(self, child: int, folder: Path) -> float:
        """Waits until a command has read its settings, which takes most of its time; returns when that was."""
        while self.run.is_command and not kills.has_ended(child) and not _writes(child, folder):
            time.sleep(0.005)
        return time.monotonic()


def _writes(child: int, folder: Path) -> bool:
    """Whether a process writes into a folder, by the names of writers there."""
    for path in folder.rglob("*.writer.json"):
        try:
            if json.loads(path.read_text())["pid"] == child:
                return True
        except (ValueError, OSError):  # half written, or gone
            continue
    return False
