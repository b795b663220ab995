"""A trial of Optuna that is told of the validations of an outer loop, and may end it."""

from __future__ import annotations

from collections.abc import Mapping

import optuna

from hypertorch.outer import Logger


class PruningLogger(Logger):
    """Reports each validation of an outer loop to a trial, and ends the run if the study's pruner says so.

    Give it last among the loggers, so that the others have the record of the validation at which the run ends.

        def objective(trial):
            lr = trial.suggest_float("lr", 1e-3, 1.0, log=True)
            loop = ht.OuterLoop(
                source,
                optimizer=lambda hparams: torch.optim.Adam(hparams, lr=lr),
                backend=ht.hypergradients.Reverse(),
                validation=ht.Validation(source=val, every=10, num_episodes=1, metric="outer_loss", mode="min"),
                loggers=[ht.search.PruningLogger(trial, metric="outer_loss", mode="min")],
            )
            return loop.run(100).best_value

    Cost: one write to the storage of the study, and one call of the pruner, for each validation.

    Args:
        trial: of a study with one objective.
        metric: the figure of the validation to report.
        mode: what is better of it, "max" or "min", which must be the study's direction.

    Raises:
        TypeError: if `trial` is no trial of a study, or `metric` no name.
        ValueError: if `mode` is not the direction of the study.
        optuna.TrialPruned: (from a run of the loop) if the pruner says that the trial is to end.

    References:
        Akiba et al. (2019), Optuna: a next-generation hyperparameter optimization framework, section 3.2.
    """

    def __init__(self, trial: optuna.trial.Trial, *, metric: str, mode: str) -> None:
        # Optuna's fixed and frozen trials have no study, whose pruner is asked.
        if not isinstance(trial, optuna.trial.Trial):
            raise TypeError(
                f"`trial` is a `{type(trial).__name__}`, which no study prunes. Pass the `optuna.Trial` that an "
                "objective is called with, or that `study.ask()` returns."
            )
        if not isinstance(metric, str):
            raise TypeError(
                f"`metric` is {metric!r}, a `{type(metric).__name__}`: figures of a validation are called by text. "
                "Pass such a name, such as 'outer_loss'."
            )
        directions = [direction.name.lower() for direction in trial.study.directions]
        if mode not in ("max", "min") or directions != [f"{mode}imize"]:
            raise ValueError(
                f"`mode` is {mode!r}, but the study of `trial` is to {' and '.join(directions)}: its pruner would end "
                "the wrong trials. Make the study with one direction, that of `mode` ('max' or 'min')."
            )
        self._trial = trial
        self._figure = f"validation/{metric}"
        self._metric = metric
        self._reported: set[int] = set()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Reports a validation; what else is logged passes by.

        Raises:
            ValueError: if a validation has no such figure.
            optuna.TrialPruned: if the pruner says that the trial is to end.
        """
        if self._figure in scalars:
            # A run that goes on from a checkpoint logs some validations again, which are the same.
            if step not in self._reported:
                self._trial.report(scalars[self._figure], step)
                self._reported.add(step)
            if self._trial.should_prune():
                raise optuna.TrialPruned(
                    f"pruned after {step} outer steps, with {self._metric} {scalars[self._figure]}"
                )
        elif found := [name.partition("/")[2] for name in scalars if name.startswith("validation/")]:
            raise ValueError(
                f"`metric` is {self._metric!r}, which the validation does not report: nothing would ever be pruned. It "
                f"has {sorted(found)}."
            )

    def rewind(self, step: int) -> None:
        """Does nothing: a trial keeps the first report of a step."""

    def close(self) -> None:
        """Does nothing: what was reported is in the storage."""
