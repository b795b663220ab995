"""The trials of a search: what draws them, runs them in batches or rungs, and tells the study what they returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import TrialState
from rich.console import Console

from hydra_plugins.hypertorch_search._jobs import Jobs, Outcome
from hydra_plugins.hypertorch_search._space import overrides_of
from hydra_plugins.hypertorch_search._study import ATTEMPT, VALUES, Drawn, Studied
from hydra_plugins.hypertorch_search.config import SearchConfig
from hypertorch.search.command import Direction, FailedTrial, SearchedCommand
from hypertorch.search.halving import Bracket, kept
from hypertorch.search.processes import Process
from hypertorch.search.racing import is_worse

_BRACKET = "bracket"


class Trials:
    """The trials that one process runs.

    Args:
        settings: the fields of `SearchConfig`.
        command: what the command says of its trials; None if it says nothing.
        jobs: what launches them.
        studied: the study.
        directions: which way each objective is better.
        brackets: of successive halving or Hyperband; empty for trials that run to their end.
        console: where a line for each trial is shown.
    """

    def __init__(
        self,
        settings: SearchConfig,
        command: SearchedCommand | None,
        jobs: Jobs,
        studied: Studied,
        *,
        directions: Sequence[Direction],
        brackets: Sequence[Bracket],
        console: Console,
    ) -> None:
        self.settings = settings
        self.command = command
        self.jobs = jobs
        self.studied = studied
        self.directions = directions
        self.brackets = brackets
        self.console = console

    def run(self, process: Process) -> None:
        """Runs trials until the study has as many as it is to have.

        Raises:
            ValueError: if rungs are to be ranked while another process is at work on the study.
        """
        if not self.brackets:
            while batch := self._next_batch():
                self._run_batch(batch)
            return
        self._refuse_company(process)
        for index, bracket in enumerate(self.brackets):
            self._run_bracket(index, bracket)

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
        configs = {trial.number: self.jobs.config(overrides_of(trial.point)) for trial in trials}
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
