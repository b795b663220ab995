"""A search: draws trials, hands them to Hydra's launcher in batches, and tells the study what they returned."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna.samplers import BaseSampler
from optuna.trial import TrialState
from rich.console import Console

from hydra_plugins.hypertorch_search._jobs import Jobs, Outcome
from hydra_plugins.hypertorch_search._settings import check_settings, check_tables
from hydra_plugins.hypertorch_search._space import described, overrides_of, read_space
from hydra_plugins.hypertorch_search._study import (
    ATTEMPT,
    VALUES,
    Drawn,
    Studied,
    begin,
    folder_of,
    open_storage,
    open_study,
    seed_of,
    storage_shown,
)
from hydra_plugins.hypertorch_search._summary import Summary
from hydra_plugins.hypertorch_search.config import SearchConfig
from hypertorch.search.command import Direction, FailedTrial, command_of
from hypertorch.search.halving import Bracket, hyperband, kept, successive_halving
from hypertorch.search.processes import Process
from hypertorch.search.racing import is_worse
from hypertorch.search.samplers import build_sampler

_BRACKET = "bracket"
_ETA = 3
# Where a sweep's folder is named on the command line.
_NAMES_FOLDER = ("paths.sweep_dir=", "hydra.sweep.dir=")


class Search:
    """One process's part of a search.

    Args:
        settings: the fields of `SearchConfig`.
        config: the configuration of the command, with Hydra's part.
        context: Hydra's.
        task: the function that is run for each trial.
        launcher: Hydra's.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        config: DictConfig,
        context: HydraContext,
        task: TaskFunction,
        launcher: Launcher,
    ) -> None:
        self.settings = SearchConfig(**settings)
        self.config = config
        self.context = context
        self.launcher = launcher
        self.command = command_of(task)
        self.console = Console()

    def run(self, arguments: Sequence[str]) -> None:
        """Runs trials until the study has as many as it is to have, and shows what it found.

        Args:
            arguments: the settings of the command line, without Hydra's.

        Raises:
            ValueError: if a setting of the search or a trial would be refused, or no trial had a value.
        """
        settings = self.settings
        check_tables(settings)
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        listed = [*(f"{name}={value}" for name, value in (settings.params or {}).items()), *arguments]
        overrides = {item.get_key_element(): item for item in parser.parse_overrides(listed)}
        swept = [item for item in overrides.values() if item.is_sweep_override()]
        fixed = [str(item.input_line) for item in overrides.values() if not item.is_sweep_override()]
        self.fixed = [word for word in fixed if not word.startswith(_NAMES_FOLDER)]
        self.space = read_space(swept, settings.conditions or {})
        check_settings(settings, self.space)
        # What a study cannot be begun with is refused before there is one.
        self.grid = self.space.grid() if settings.sampler == "grid" else []
        self.starts = [self.space.start(table) for table in settings.starts or ()]
        self._sampler(settings.seed)
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        self.jobs = self._jobs(folder)
        self.directions = self._check_trials()
        self._check_searched()
        self.brackets = self._brackets()
        storage = open_storage(settings.storage, folder)
        study, is_new = open_study(storage, settings.study_name, self.directions, self._record())
        given = (*self.config.hydra.overrides.task, *self.config.hydra.overrides.hydra)
        folder = folder_of(study, folder, is_named=any(word.startswith(_NAMES_FOLDER) for word in given))
        self._open_folder(folder, is_new=is_new)
        begin(study, self.directions, self._record())
        with Process(storage, storage.get_study_id_from_name(settings.study_name)) as process:
            self.studied = Studied(study, storage, process, self.space)
            study.sampler = self._sampler(seed_of(settings.seed, process))
            try:
                self._run_trials(process)
            except KeyboardInterrupt as interrupt:
                raise KeyboardInterrupt(
                    "interrupted. The study was in memory and is lost; the runs of its trials are kept."
                    if settings.storage == "memory"
                    else "interrupted. What was found so far is kept; the same command with "
                    f"paths.sweep_dir={folder} goes on from there."
                ) from interrupt
        self._summary(storage_shown(settings.storage, folder), folder).show()

    def _run_trials(self, process: Process) -> None:
        self.studied.enqueue(self.grid or self.starts)
        if not self.brackets:
            while batch := self._next_batch():
                self._run_batch(batch)
            return
        self._refuse_company(process)
        for index, bracket in enumerate(self.brackets):
            self._run_bracket(index, bracket)

    # What is known before the first trial.

    def _sampler(self, seed: int) -> BaseSampler:
        settings = self.settings
        return build_sampler(
            settings.sampler,
            self.space.distributions,
            seed=seed,
            settings=settings.settings or {},
            batch=settings.n_jobs,
        )

    def _jobs(self, folder: Path) -> Jobs:
        return Jobs(
            self.config,
            self.context,
            self.launcher,
            fixed=self.fixed,
            folder=folder,
            num_objectives=len(self.settings.objectives),
        )

    def _check_trials(self) -> list[Direction]:
        """Returns the direction of each objective, after checking every end of the space."""
        names, given = self.settings.objectives, self.settings.directions
        found: dict[tuple[Direction, ...], list[str]] = {}
        for point in self.space.ends():
            overrides = overrides_of(point)
            if self.command is None:
                self.jobs.with_config(overrides, bool)
                continue
            known = self.jobs.with_config(overrides, self.command.check)
            missing = [name for name in names if name not in known]
            if missing:
                raise ValueError(
                    f"`hydra.sweeper.objectives` lists {missing[0]!r}, which the trials do not report. Use some of: "
                    f"{', '.join(known)}."
                )
            better: list[Direction] = [known[name] for name in names]
            found[tuple(better)] = overrides
        if len(found) > 1:
            (first, where), (second, other) = list(found.items())[:2]
            raise ValueError(
                f"`hydra.sweeper.objectives` is {names}, which is better {first} with {' '.join(where)} and {second} "
                f"with {' '.join(other)}: no study can compare them. Search each of them alone."
            )
        if not found and given is None:
            raise ValueError(
                "`hydra.sweeper.directions` is not given, and this command does not say what is better: a search could "
                "go the wrong way. Write hydra.sweeper.directions=[max] or [min]."
            )
        directions: list[Direction] = list(next(iter(found))) if found else [_direction(word) for word in given or ()]
        if given is not None and list(given) != list(directions):
            raise ValueError(
                f"`hydra.sweeper.directions` is {given}, but of {', '.join(names)} the experiment says {directions} is "
                "better: the search would look for the worst. Leave it out."
            )
        return directions

    def _check_searched(self) -> None:
        """Checks that trials can be compared, and that each has the same seeds."""
        if self.command is None:
            return
        names = list(self.space.distributions)
        self.command.check_searched(names)
        for word in self._seed_words(0) if self.settings.seeds > 1 else ():
            seed = word.partition("=")[0].lstrip("+")
            if seed in {name.lstrip("+") for name in names}:
                raise ValueError(
                    f"`{seed}` has several values, and `hydra.sweeper.seeds` is {self.settings.seeds}, which counts up "
                    f"from each of them: trials would be compared over different seeds. Give {seed} one value, or "
                    "leave hydra.sweeper.seeds out."
                )

    def _seed_words(self, index: int) -> list[str]:
        """Returns the overrides of a repetition where the seed is not searched."""
        point = overrides_of(self.space.ends()[0])
        return self.jobs.with_config(
            point, lambda config: [] if self.command is None else self.command.seeded(config, index)
        )

    def _brackets(self) -> list[Bracket]:
        """Returns what successive halving or Hyperband runs; nothing without a pruner."""
        settings = self.settings
        if settings.pruner is None or settings.min_steps is None:
            return []
        if self.command is None:
            raise ValueError(
                f"`hydra.sweeper.pruner` is {settings.pruner!r}, but this command does not say how a trial goes on. "
                "Leave it out, or attach a `hypertorch.search.SearchedCommand`."
            )
        point = overrides_of(self.space.ends()[0])
        eta, longest = settings.eta or _ETA, self.jobs.with_config(point, self.command.length)
        if settings.pruner == "hyperband":
            brackets = hyperband(settings.min_steps, longest, eta)
        else:
            brackets = [successive_halving(settings.num_trials or 1, settings.min_steps, longest, eta)]
        for point in self.space.ends():
            words = overrides_of(point)
            whole = self.jobs.with_config(words, _itself)
            rungs = [
                self.jobs.with_config([*words, *self._up_to(whole, steps)], _itself) for steps in brackets[0].steps
            ]
            self.command.check_rungs(rungs)
        return brackets

    def _record(self) -> dict[str, Any]:
        settings = self.settings
        fixed = self.fixed if self.command is None else self.command.identifying(self.fixed)
        record = {**described(self.space), "command": sorted(fixed)}
        for name in ("objectives", "pruner", "min_steps", "eta", "seeds", "racing"):
            record[name] = getattr(settings, name)
        if settings.pruner == "successive_halving":
            record["num_trials"] = settings.num_trials
        return record

    def _open_folder(self, folder: Path, *, is_new: bool) -> None:
        if is_new and (folder / "0").exists():
            raise ValueError(
                f"`paths.sweep_dir` is {str(folder)!r}, where there are trials already, but their study is not in "
                "`hydra.sweeper.storage`: they would be lost. Name another folder, or the storage that has the study."
            )
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        with open_dict(self.config):  # launchers write there too
            self.config.hydra.sweep.dir = str(folder)
        self.jobs = self._jobs(folder)
        self.console.print(f"search in {folder}", highlight=False, soft_wrap=True)

    def _refuse_company(self, process: Process) -> None:
        if process.others():
            raise ValueError(
                f"`hydra.sweeper.pruner` is {self.settings.pruner!r}, and another process is at work on the study: a "
                "rung is ranked as a whole, by one process. Use hydra/launcher=joblib or submitit with "
                "hydra.sweeper.n_jobs for trials beside each other, or wait until it ends."
            )

    # Trials that run to their end.

    def _next_batch(self) -> list[Drawn]:
        most = self.settings.n_jobs
        batch = self.studied.take_up(most)
        while len(batch) < most:
            drawn = self._draw()
            if drawn is None:
                break
            batch.append(drawn)
        return batch

    def _draw(self) -> Drawn | None:
        if self.settings.num_trials is None:
            return self.studied.draw_waiting()
        if len(self.studied.trials()) >= self.settings.num_trials:
            return None
        drawn = self.studied.draw()
        if drawn.number < self.settings.num_trials:
            return drawn
        self.studied.fail(drawn.number, "another process drew the last trial of the search")
        return None

    def _run_batch(self, batch: Sequence[Drawn]) -> None:
        if self.settings.seeds > 1:
            self._run_seeds(batch)
            return
        for trial, outcome in self._launch(batch, [[] for _ in batch]):
            if not isinstance(outcome, FailedTrial):
                self._complete(trial, outcome)

    def _run_seeds(self, batch: Sequence[Drawn]) -> None:
        """Runs the trials of a batch with one seed after the other, and tells their means."""
        running = {trial.number: trial for trial in batch}
        values = {number: list(self.studied.attribute(number, VALUES, [])) for number in running}
        for index in range(self.settings.seeds):
            due = [trial for number, trial in running.items() if len(values[number]) == index]
            words = [self._seeded(trial, index) for trial in due]
            subfolders = [f"{trial.number}/seed_{index}" for trial in due]
            for trial, outcome in self._launch(due, words, subfolders):
                if isinstance(outcome, FailedTrial):
                    del running[trial.number]
                    continue
                values[trial.number].append(outcome if len(outcome) > 1 else outcome[0])
                self.studied.note(trial.number, VALUES, values[trial.number])
            if self.settings.racing and index + 1 < self.settings.seeds:
                for number in self._losers({number: values[number] for number in running}):
                    self.studied.report(number, index + 1, float(np.mean(values[number])))
                    self.studied.prune(number)
                    self._say(running.pop(number), f"out of the race after {index + 1} seeds")
        for number, trial in running.items():
            self._complete(trial, np.atleast_1d(np.mean(values[number], axis=0)).tolist())

    def _seeded(self, trial: Drawn, index: int) -> list[str]:
        if self.command is None:
            raise ValueError(
                f"`hydra.sweeper.seeds` is {self.settings.seeds}, but this command does not say how it is seeded. "
                "Leave it out, or attach a `hypertorch.search.SearchedCommand`."
            )
        return self.jobs.with_config(
            overrides_of(trial.point), lambda config: [] if self.command is None else self.command.seeded(config, index)
        )

    def _losers(self, running: Mapping[int, list[float]]) -> list[int]:
        """Returns the trials that are worse than the best at the seeds that they have been run with."""
        maximise = self.directions[0] == "max"
        finished = [trial.user_attrs[VALUES] for trial in self.studied.trials(TrialState.COMPLETE)]
        losers = []
        for number, values in running.items():
            rivals = [*finished, *(others for other, others in running.items() if other != number)]
            rivals = [rival[: len(values)] for rival in rivals if len(rival) >= len(values)]
            if not rivals:
                continue
            best = max(rivals, key=lambda rival: np.mean(rival) if maximise else -np.mean(rival))
            if is_worse(values, best, maximise=maximise):
                losers.append(number)
        return losers

    # Trials of which some end early.

    def _run_bracket(self, index: int, bracket: Bracket) -> None:
        trials = self._trials_of(index, bracket)
        configs = {trial.number: self.jobs.with_config(overrides_of(trial.point), _itself) for trial in trials}
        for rung, steps in enumerate(bracket.steps):
            reached = {one.number: one.intermediate_values for one in self.studied.trials()}
            is_next = {
                one.number: rung == 0 or bracket.steps[rung - 1] in reached[one.number]
                for one in self.studied.trials(TrialState.RUNNING)
            }
            due = [one for one in trials if is_next.get(one.number) and steps not in reached[one.number]]
            for start in range(0, len(due), self.settings.n_jobs):
                chunk = due[start : start + self.settings.n_jobs]
                words = [self._up_to(configs[trial.number], steps) for trial in chunk]
                for trial, outcome in self._launch(chunk, words, goes_on=rung > 0):
                    if not isinstance(outcome, FailedTrial):
                        self.studied.report(trial.number, steps, outcome[0])
            self._end_rung(trials, bracket, rung)

    def _trials_of(self, index: int, bracket: Bracket) -> list[Drawn]:
        """Returns the trials of a bracket: those that the study has, and new ones."""
        known = self.studied.take_up(len(self.studied.trials()))
        for trial in known:
            # Of a process that ended between drawing a trial and putting it into its bracket.
            if self.studied.attribute(trial.number, _BRACKET) is None:
                self.studied.note(trial.number, _BRACKET, index)
        trials = [
            Drawn(number=one.number, point=dict(one.params), is_taken_up=True)
            for one in self.studied.trials()
            if one.user_attrs.get(_BRACKET) == index
        ]
        while len(trials) < bracket.sizes[0]:
            drawn = self.studied.draw()
            self.studied.note(drawn.number, _BRACKET, index)
            trials.append(drawn)
        return trials

    def _end_rung(self, trials: Sequence[Drawn], bracket: Bracket, rung: int) -> None:
        steps = bracket.steps[rung]
        now = {one.number: one for one in self.studied.trials()}
        ranked = [trial for trial in trials if steps in now[trial.number].intermediate_values]
        values = [now[trial.number].intermediate_values[steps] for trial in ranked]
        is_last = steps == bracket.steps[-1]
        size = len(ranked) if is_last else bracket.sizes[rung + 1]
        going_on = set(kept(values, size, maximise=self.directions[0] == "max"))
        for place, trial in enumerate(ranked):
            if now[trial.number].state is not TrialState.RUNNING:
                continue
            if place not in going_on:
                self.studied.prune(trial.number)
                self._say(trial, f"out after {steps} outer steps, with {values[place]:.6g}")
            elif is_last:
                self._complete(trial, [values[place]])

    def _up_to(self, config: Any, steps: int) -> list[str]:
        return [] if self.command is None else self.command.lengthened(config, steps)

    # What both have.

    def _launch(
        self,
        trials: Sequence[Drawn],
        words: Sequence[Sequence[str]],
        subfolders: Sequence[str] | None = None,
        *,
        goes_on: bool = False,
    ) -> list[tuple[Drawn, list[float] | FailedTrial]]:
        """Runs one job for each trial; a failed one is told to the study.

        Raises:
            Exception: what stopped a job and says nothing of its settings, after the others were told.
        """
        jobs = []
        for trial, own, subfolder in zip(trials, words, subfolders or [str(one.number) for one in trials], strict=True):
            more, where = self._going_on(trial, subfolder) if goes_on or trial.is_taken_up else ([], subfolder)
            jobs.append((where, [*overrides_of(trial.point), *own, *more]))
        found: list[tuple[Drawn, list[float] | FailedTrial]] = []
        stopped: list[BaseException] = []
        outcomes: list[Outcome] = self.jobs.launch(jobs) if jobs else []
        for trial, outcome in zip(trials, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                stopped.append(outcome)
                continue
            if isinstance(outcome, FailedTrial):
                self.studied.fail(trial.number, outcome.why)
                self._say(trial, f"failed: {outcome.why}")
            found.append((trial, outcome))
        if stopped:
            for trial, outcome in found:
                if isinstance(outcome, list) and self.settings.seeds == 1 and not self.brackets:
                    self._complete(trial, outcome)
            raise stopped[0]
        return found

    def _going_on(self, trial: Drawn, subfolder: str) -> tuple[list[str], str]:
        """Returns the overrides with which a begun trial goes on, and its subfolder."""
        continued = None if self.command is None else self.command.continued(self.settings.objectives)
        if continued is not None:
            return continued, subfolder
        attempt = int(self.studied.attribute(trial.number, ATTEMPT, 0)) + 1
        self.studied.note(trial.number, ATTEMPT, attempt)
        return [], f"{subfolder}_attempt_{attempt}"

    def _complete(self, trial: Drawn, values: Sequence[float]) -> None:
        self.studied.complete(trial.number, values)
        shown = ", ".join(f"{name} {value:.6g}" for name, value in zip(self.settings.objectives, values, strict=True))
        self._say(trial, shown)

    def _say(self, trial: Drawn, what: str) -> None:
        self.console.print(
            f"trial {trial.number}: {what}  ({' '.join(overrides_of(trial.point))})",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def _summary(self, storage: str, folder: Path) -> Summary:
        return Summary(
            studied=self.studied,
            objectives=self.settings.objectives,
            brackets=self.brackets,
            repetitions=[shlex.join(self._seed_words(index)) for index in range(1, self.settings.seeds)],
            program="" if self.command is None else self.command.program,
            fixed=self.fixed,
            resumed=[] if self.command is None or self.settings.seeds > 1 else self.command.continued(()) or [],
            storage=storage,
            study_name=self.settings.study_name,
            folder=folder,
            console=self.console,
        )


def _direction(word: str) -> Direction:
    return "max" if word == "max" else "min"


def _itself(config: Any) -> Any:
    return config
