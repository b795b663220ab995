"""The run of an outer loop: its steps, validations and checkpoints, from where it begins to the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from hypertorch.constraints import Constraint
from hypertorch.errors import LostRankError
from hypertorch.hypergradients import Hypergradient, measured_execution
from hypertorch.hypergradients.reverse_mode.compiled.costs import warn_if_too_short
from hypertorch.inner.execution import Execution
from hypertorch.outer.beginning import begin_alike, begin_run, first_hparams
from hypertorch.outer.evaluation.evaluate import evaluate
from hypertorch.outer.evaluation.report import Report
from hypertorch.outer.evaluation.validation import Validation
from hypertorch.outer.fingerprint import fingerprint
from hypertorch.outer.guards.finiteness import check_finite
from hypertorch.outer.guards.memory_limit import within_memory
from hypertorch.outer.guards.zero_hypergradients import ZeroWatch
from hypertorch.outer.reporting.progress import ProgressDisplay, progress_display
from hypertorch.outer.reporting.scalars import to_floats
from hypertorch.outer.reporting.stopwatch import Stopwatch
from hypertorch.outer.settings import OuterSettings, check_count
from hypertorch.outer.steps.constraining import match_constraints, project_in_place
from hypertorch.outer.steps.non_finite_steps import check_can_be_shortened, finite_step
from hypertorch.outer.steps.state import OuterState
from hypertorch.outer.steps.step import (
    NON_FINITE_STEPS,
    STEPS_PER_SECOND,
    VALIDATION,
    Proposal,
    propose,
    refuse_reserved_metrics,
    take,
)
from hypertorch.outer.storage.background import BackgroundWriter, background_writer
from hypertorch.outer.storage.checkpoints import Checkpoints
from hypertorch.outer.storage.hparams_file import HPARAMS_FILE, save_hparams
from hypertorch.outer.storage.interrupts import uninterrupted
from hypertorch.outer.storage.one_writer import one_writer
from hypertorch.outer.trained import Trained
from hypertorch.problem import BilevelProblem, ProblemSource
from hypertorch.types import TensorMapping

T = TypeVar("T")

_HALF_WIDTH = "_half_width"
_RISE = 10.0  # the outer losses of single episodes differ by less


def train(
    loop: OuterSettings,
    source: ProblemSource,
    backend: Hypergradient,
    *,
    num_outer_steps: int,
    start_from: TensorMapping | None = None,
    resume: bool = False,
    override: bool = False,
    zeros_allowed: Collection[str] | None = None,
) -> Trained:
    """Returns what `OuterLoop.run` returns; that method documents it.

    Args:
        loop: the outer loop.
        source: where its problems come from.
        backend: how hypergradients are computed.
        num_outer_steps: outer steps in all.
        start_from: outer variables to start from.
        resume: go on from the newest checkpoint if there is one.
        override: go on with other settings than the checkpoint was made with.
        zeros_allowed: outer variables of a single inner run that may have a zero hypergradient; they are watched from
            its start only. None for outer steps that each have a run of their own, and for what the problems allow.
    """
    check_count("num_outer_steps", num_outer_steps, "outer steps to take")
    state = OuterState(
        first_hparams(source, start_from),
        optimizer=loop.optimizer,
        scheduler=loop.scheduler,
        learning_rates=loop.learning_rates,
    )
    if override and not resume:
        raise ValueError(
            "`override` is True, but `resume` is False: a new run has no earlier settings to go on with. Pass "
            "`resume=True` too, or leave `override` out."
        )

    def settings(*, of_problem: bool) -> dict[str, str]:
        # A problem that is its own source is at hand.
        is_known = of_problem or isinstance(source, BilevelProblem)
        return fingerprint(loop, backend, source.at(0) if is_known else None, state.first_settings())

    with ExitStack() as stack:

        def begin() -> bool:
            if loop.checkpoints is not None:
                stack.enter_context(one_writer(loop.checkpoints.directory))
            return begin_run(loop, state, num_outer_steps, settings, resume=resume, override=override)

        ranks = loop.execution.ranks
        if ranks is None:
            resumed = begin()
        else:
            resumed = begin_alike(ranks, begin, state)
            if not ranks.is_first:
                loop = replace(loop, loggers=(), snapshots=None, checkpoints=None, progress=False)
        with background_writer() as writer:
            run = _Run(
                loop, source, backend, state, num_outer_steps, writer, resumed=resumed, zeros_allowed=zeros_allowed
            )
            if not run.is_over():
                run.to_the_end()
        return _conclude(loop, state)


def _conclude(loop: OuterSettings, state: OuterState) -> Trained:
    hparams = state.copy_hparams()
    _check_finite(state, loop.checkpoints)
    best = state.best_hparams or hparams  # empty without a validation, or if every one gave NaN
    if loop.checkpoints is not None:
        save_hparams(loop.checkpoints.directory / HPARAMS_FILE, best)
    return Trained(
        hparams=hparams,
        best_hparams=best,
        best_step=state.step if state.best_step is None else state.best_step,
        best_value=state.best_value,
        num_outer_steps=state.step,
        seconds=state.seconds,
        carry=state.carry,
    )


class _Run:
    """One call of `train`.

    A run is a sequence of two kinds of action: a step with its record, and a validation with its record. Each changes
    the state in a section that no interrupt can split, so that every checkpoint lies between two actions.
    """

    def __init__(
        self,
        loop: OuterSettings,
        source: ProblemSource,
        backend: Hypergradient,
        state: OuterState,
        num_outer_steps: int,
        writer: BackgroundWriter,
        *,
        resumed: bool,
        zeros_allowed: Collection[str] | None,
    ) -> None:
        self._loop = loop
        self._source = source
        self._backend = backend
        self._state = state
        self._num_outer_steps = num_outer_steps
        self._writer = writer
        self._saved = self._position() if resumed else None
        self._stopwatch = Stopwatch(seconds=state.seconds, step=state.step)
        self._constraints: dict[str, Constraint] = {}
        self._zeros_allowed = zeros_allowed
        # In a single inner run the effect of its start fades, in the end to zero, which is no mistake.
        is_watched = zeros_allowed is None or state.step == 0
        self._zeros = ZeroWatch(state.leaves if is_watched else (), first=state.step, last=num_outer_steps - 1)
        self._first = state.step
        self._losses: list[Tensor] = []  # at the first and at the last step of this call

    def is_over(self) -> bool:
        """Returns whether all steps are done, and validated."""
        state = self._state
        return state.step > self._num_outer_steps or (
            state.step == self._num_outer_steps and not self._validation_is_due()
        )

    def to_the_end(self) -> None:
        """Takes the remaining steps."""
        loop, metric = self._loop, self._loop.validation and self._loop.validation.metric
        try:
            with progress_display(
                enabled=loop.progress,
                title="outer steps",
                total=self._num_outer_steps,
                metric=metric,
                first=self._state.step,
            ) as display:
                with self._stopwatch.excluded():
                    self._prepare()
                self._iterate(display)
            self._warn_of_a_rise()
        except (KeyboardInterrupt, SystemExit, LostRankError):
            with uninterrupted():
                self._save()
            raise
        finally:
            self._state.seconds = self._stopwatch.seconds
            for logger in loop.loggers:
                logger.close()

    def _prepare(self) -> None:
        """Decides what holds for all steps, so that a mistake shows before the first."""
        loop, state = self._loop, self._state
        if state.step >= self._num_outer_steps:
            return
        problem = self._source.at(state.step)
        self._constraints = match_constraints(state.leaves, chosen=loop.constraints or {}, problem=problem)
        # A resumed run starts from inside already: every step ends there.
        if state.step == 0:
            project_in_place(state.hparams, self._constraints)
        # Measured once and kept in the checkpoint: a resumed run that measured again could take the other route, whose
        # rounding and dropout noise differ.
        if state.task_route is None and problem.num_tasks is not None:
            state.task_route = self._measured_route(problem)
        if loop.on_non_finite == "shorten":
            check_can_be_shortened(problem)
        refuse_reserved_metrics(problem, state, execution=self._execution)
        if loop.validation is not None:
            # One episode shows a misspelt metric now, not at the first validation hours later.
            report = self._evaluate(loop.validation, num_episodes=1)
            loop.validation.figure(report)
            _validation_figures(report)
        if state.step == 0:
            self._show_snapshot()

    def _measured_route(self, problem: BilevelProblem) -> str:
        ranks, state = self._loop.execution.ranks, self._state

        def measure() -> str:
            return measured_execution(
                problem,
                state.hparams,
                backend=self._backend,
                outer_step=state.step,
                execution=self._loop.execution,
            ).tasks

        # One answer for all processes: their routes would round differently.
        return measure() if ranks is None else ranks.first(measure)

    def _iterate(self, display: ProgressDisplay) -> None:
        state = self._state
        while True:
            if self._validation_is_due():
                with self._stopwatch.excluded():
                    self._validate(display)
            if self._checkpoint_is_due():
                # Torn apart, a checkpoint would be complete on disk and unknown here, and be written twice.
                with self._stopwatch.excluded(), uninterrupted():
                    self._save()
            if state.step >= self._num_outer_steps:
                return
            self._writer.check()
            self._step(display)

    def _step(self, display: ProgressDisplay) -> None:
        loop, state = self._loop, self._state
        done = state.step + 1
        to_log = done % loop.log_every == 0 or done == self._num_outer_steps
        problem = self._source.at(state.step)
        # Nothing of the state changes here, where most of the time goes: an interrupt needs no protection.
        proposal = finite_step(
            lambda problem: self._propose(problem, with_figures=to_log),
            problem,
            state,
            on_non_finite=loop.on_non_finite,
            most=loop.most_non_finite,
        )
        if proposal is not None:
            allowed = problem.allow_unused if self._zeros_allowed is None else self._zeros_allowed
            self._zeros.look(state.step, proposal.grads, allowed)
            # Tensors, read at the end only: a number for every step would wait for the device.
            self._losses = [*self._losses[:1], proposal.outer_loss]
        # The record belongs to the step: an interrupt between the two would leave a checkpoint whose record is missing.
        with uninterrupted():
            if proposal is None:
                state.skip()
            else:
                take(proposal, state, self._constraints)
            self._show_snapshot()
            if to_log:
                warn_if_too_short(done - self._first, self._num_outer_steps - done)
                figures = {} if proposal is None else to_floats(proposal.figures)
                if loop.on_non_finite != "raise":
                    figures[NON_FINITE_STEPS] = float(state.non_finite_steps)
                self._log({**figures, STEPS_PER_SECOND: self._stopwatch.rate(done)}, display)
        display.advance(done)

    def _propose(self, problem: BilevelProblem, *, with_figures: bool) -> Proposal:
        def of(execution: Execution) -> Proposal:
            return propose(
                problem,
                self._state,
                backend=self._backend,
                execution=execution,
                clip_norm=self._loop.clip_norm,
                with_figures=with_figures,
            )

        return self._in_memory(of, lambda: problem.num_tasks)

    def _in_memory(self, compute: Callable[[Execution], T], num_tasks: Callable[[], int | None]) -> T:
        found, execution = within_memory(compute, self._execution, num_tasks)
        if execution.chunk != self._execution.chunk:
            self._state.chunk = execution.chunk
        return found

    def _show_snapshot(self) -> None:
        snapshots, state = self._loop.snapshots, self._state
        if snapshots is not None and (state.step % snapshots.every == 0 or state.step == self._num_outer_steps):
            snapshots.show(state.step, state.copy_hparams(), self._loop.loggers)

    def _warn_of_a_rise(self) -> None:
        """Warns if the outer loss rose so far that the last outer variables cannot be what was wanted."""
        # With a validation `best_hparams` are the best that were seen, however the run ended.
        if self._loop.validation is not None or len(self._losses) < 2:
            return
        first, last = (float(loss) for loss in self._losses)
        if 0.0 < _RISE * first < last:
            warnings.warn(
                f"`outer_loss` is {last:.3g} at outer step {self._state.step - 1}, and was {first:.3g} at outer step "
                f"{self._first}: the outer run diverged, and without a `validation` `best_hparams` are the last outer "
                "variables. Lower the learning rate of the outer optimizer, pass `clip_norm`, or pass a `validation`, "
                "which keeps the best.",
                stacklevel=5,  # the caller of `run`
            )

    @property
    def _execution(self) -> Execution:
        """How problems are run: as the loop says, and what was found out about it as it was in the run's first part."""
        asked, state = self._loop.execution, self._state
        return replace(
            asked,
            tasks=asked.tasks if state.task_route is None or asked.tasks != "auto" else state.task_route,
            chunk=asked.chunk if state.chunk is None else state.chunk,
        )

    def _validate(self, display: ProgressDisplay) -> None:
        validation, state = self._loop.validation, self._state
        if validation is None:
            return
        _check_finite(state, self._loop.checkpoints, self._writer)
        report = self._evaluate(validation, num_episodes=validation.num_episodes)
        value = validation.figure(report)
        with uninterrupted():
            if validation.improves(value, state.best_value):
                state.best_hparams, state.best_step, state.best_value = state.copy_hparams(), state.step, value
            state.validated_step = state.step
            self._log(_validation_figures(report), display)

    def _evaluate(self, validation: Validation, *, num_episodes: int) -> Report:
        # Rounding depends on how tasks are run, and the choice of the best may depend on rounding: a resumed run must
        # evaluate as the run of its checkpoint did.
        return self._in_memory(
            lambda execution: evaluate(
                validation.source, self._state.hparams, num_episodes=num_episodes, execution=execution
            ),
            lambda: validation.source.at(0).num_tasks,
        )

    def _log(self, figures: Mapping[str, float], display: ProgressDisplay) -> None:
        for logger in self._loop.loggers:
            logger.log(self._state.step, figures)
        display.show(figures)

    def _validation_is_due(self) -> bool:
        validation, step = self._loop.validation, self._state.step
        if validation is None or step == self._state.validated_step:
            return False
        return step % validation.every == 0 or step == self._num_outer_steps

    def _checkpoint_is_due(self) -> bool:
        checkpoints, step = self._loop.checkpoints, self._state.step
        if checkpoints is None or step == 0:
            return False
        return step % checkpoints.every == 0 or step == self._num_outer_steps

    def _save(self) -> None:
        """Begins to write a checkpoint, unless there is nothing new since the last."""
        if self._loop.checkpoints is None or self._state.step == 0 or self._saved == self._position():
            return
        # Before the state is copied: there is never more than one copy.
        self._writer.wait()
        # A run that resumed from NaN could never recover, and the checkpoint may be the only one that is kept.
        _check_finite(self._state, self._loop.checkpoints)
        self._state.seconds = self._stopwatch.seconds
        self._writer.begin(self._loop.checkpoints.prepare(self._state.capture()))
        self._saved = self._position()

    def _position(self) -> tuple[int, int]:
        return self._state.step, self._state.validated_step


def _check_finite(state: OuterState, checkpoints: Checkpoints | None, writer: BackgroundWriter | None = None) -> None:
    def remedy() -> str:
        if writer is not None:
            writer.wait()  # for the checkpoint that is named
        newest = None if checkpoints is None else checkpoints.newest()
        kept = "" if newest is None else f" The last checkpoint, `{newest}`, holds none."
        return f"Lower the outer learning rate, or bound the hypergradient by `clip_norm`.{kept}"

    check_finite(state.hparams, where=f"after {state.step} outer steps", remedy=remedy)


def _validation_figures(report: Report) -> dict[str, float]:
    clash = sorted(name for name in report.metrics if f"{name}{_HALF_WIDTH}" in report.metrics)
    if clash:
        raise ValueError(
            f"`OuterProblem.metrics` returned `{clash[0]}{_HALF_WIDTH}` beside `{clash[0]}`: the interval of the "
            "second is logged under the name of the first. Rename the metric."
        )
    figures: dict[str, float] = {}
    for name, estimate in report.metrics.items():
        figures[f"{VALIDATION}{name}"] = estimate.mean
        figures[f"{VALIDATION}{name}{_HALF_WIDTH}"] = estimate.half_width
    return figures
