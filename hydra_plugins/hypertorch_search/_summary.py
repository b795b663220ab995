"""What a search shows at its end: the best trials, how to use them, and where everything is."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from hydra_plugins.hypertorch_search._pictures import draw_study
from hydra_plugins.hypertorch_search._space import overrides_of
from hydra_plugins.hypertorch_search._study import ATTEMPT, VALUES, Studied
from hypertorch.search.halving import Bracket

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is shown.

    Args:
        studied: the study.
        objectives: their names.
        brackets: of successive halving; none without.
        repetitions: what makes the command of a trial that with its second seed, its third, and so on; none with one.
        program: how the command is called.
        fixed: the overrides of all trials.
        resumed: the overrides with which a trial's run goes on; none where it cannot.
        storage: what `optuna-dashboard` takes; "" for none.
        study_name: of the study there.
        folder: of the trials.
        console: where to.
    """

    studied: Studied
    objectives: Sequence[str]
    brackets: Sequence[Bracket]
    repetitions: Sequence[str]
    program: str
    fixed: Sequence[str]
    resumed: Sequence[str]
    storage: str
    study_name: str
    folder: Path
    console: Console

    def show(self) -> None:
        """Writes trials.csv and the pictures, and prints the table, the best settings and the places.

        Raises:
            ValueError: if no trial had a value.
        """
        trials = self.studied.trials()
        self._write_csv(trials)
        counts = {state: sum(trial.state is state for trial in trials) for state in TrialState}
        finished = [trial for trial in trials if trial.state is TrialState.COMPLETE]
        if not finished:
            reasons = [str(trial.user_attrs["why"]) for trial in trials if "why" in trial.user_attrs]
            raise ValueError(
                f"`hydra/sweeper` is search, whose {len(trials)} trials all ended without a value: there is no best. "
                f"The first: {reasons[0] if reasons else 'it is still running'}. Correct the settings or the ranges."
            )
        best = self.studied.study.best_trials[: 1 if len(self.objectives) == 1 else None]
        self._print_table(finished, best)
        self._say(
            f"{len(trials)} trials: {counts[TrialState.COMPLETE]} finished, {counts[TrialState.PRUNED]} ended early, "
            f"{counts[TrialState.FAIL]} failed"
            + (f", {counts[TrialState.RUNNING]} run in other processes" if counts[TrialState.RUNNING] else "")
        )
        if self.brackets:
            self._print_steps(trials)
        for trial in best[:_SHOWN]:
            self._print_best(trial)
        pictures = draw_study(self.studied.study, self.objectives, self.folder)
        self._say(f"trials.csv{''.join(f', {path.name}' for path in pictures)} and the trials are in {self.folder}")
        if self.storage:
            self._say(f"the study {self.study_name!r}: {shlex.join(['optuna-dashboard', self.storage])}")

    def _print_table(self, finished: Sequence[FrozenTrial], best: Sequence[FrozenTrial]) -> None:
        signs = [-1 if direction.name == "MAXIMIZE" else 1 for direction in self.studied.study.directions]
        front = {trial.number for trial in best}
        ordered = sorted(finished, key=lambda one: (one.number not in front, signs[0] * one.values[0], one.number))
        table = Table(title="the best trials", title_justify="left")
        for column in ("trial", *self.objectives, *self.studied.space.distributions):
            table.add_column(column, justify="right", overflow="fold")
        for trial in ordered[:_SHOWN]:
            values = [f"{value:.6g}" for value in trial.values]
            table.add_row(str(trial.number), *values, *(self._shown(trial, name) for name in self._names()))
        self.console.print(table)

    def _print_steps(self, trials: Sequence[FrozenTrial]) -> None:
        continued = sum(max(trial.intermediate_values, default=0) for trial in trials)
        restarted = sum(sum(trial.intermediate_values) for trial in trials)
        saved = 1 - continued / restarted if restarted else 0.0
        self._say(
            f"{continued} outer steps, where rungs that start anew take {restarted}: {100 * saved:.1f} % saved "
            "(trials that failed count up to their last rung)"
        )

    def _print_best(self, trial: FrozenTrial) -> None:
        command = [*self.program.split(), *self.fixed, *overrides_of(trial.params)]
        values = ", ".join(f"{name} {value:.6g}" for name, value in zip(self.objectives, trial.values, strict=True))
        where, anew = f"trial {trial.number}", "Anew, and judged on the test"
        if self.repetitions:
            where += f", the mean of {len(self.repetitions) + 1} seeds"
            others = " or ".join(self.repetitions)
            anew = f"Anew with the first of them only, and judged on the test (for another add {others})"
        self._say(f"best: {values}, {where}. {anew}:" if self.program else f"best: {values}")
        self._say(f"  {shlex.join(command)}")
        attempt = trial.user_attrs.get(ATTEMPT)
        folder = self.folder / (f"{trial.number}" if attempt is None else f"{trial.number}_attempt_{attempt}")
        if self.resumed and folder.is_dir():
            self._say("without training again:")
            self._say(f"  {shlex.join([*command, f'paths.run_dir={folder}', *self.resumed])}")

    def _write_csv(self, trials: Sequence[FrozenTrial]) -> None:
        with (self.folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["trial", "state", *self.objectives, *self._names(), "last_step", "seeds", "why"])
            for trial in trials:
                values = trial.values or [""] * len(self.objectives)
                settings = [trial.params.get(name, "") for name in self._names()]
                # What a race reports is counted in seeds.
                last = max(trial.intermediate_values, default="") if self.brackets else ""
                seeds = len(trial.user_attrs.get(VALUES, ())) if self.repetitions else ""
                why = trial.user_attrs.get("why", "")
                writer.writerow([trial.number, trial.state.name, *values, *settings, last, seeds, why])

    def _names(self) -> list[str]:
        return list(self.studied.space.distributions)

    def _shown(self, trial: FrozenTrial, name: str) -> str:
        value = trial.params.get(name, "")
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
