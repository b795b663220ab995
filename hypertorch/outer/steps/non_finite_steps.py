"""Outer steps without a hypergradient: where a run met NaN or infinity, it can go on without that step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias, TypeVar

from hypertorch import tree
from hypertorch.dynamics.settings import is_schedule
from hypertorch.errors import IncompatibleBackendError, NonFiniteError, NonFiniteWarning
from hypertorch.outer.steps.state import OuterState
from hypertorch.problem import BilevelProblem

T = TypeVar("T")

OnNonFinite: TypeAlias = Literal["raise", "skip", "shorten"]
"""What an outer step without a finite hypergradient does: ends the run, is left out, or is taken over fewer steps."""

POLICIES = ("raise", "skip", "shorten")


def check_can_be_shortened(problem: BilevelProblem) -> None:
    """Raises a `ValueError` if the horizon of a problem is fixed by a schedule."""
    for name, setting in problem.dynamics.settings().items():
        if is_schedule(setting):
            raise ValueError(
                f"`on_non_finite` is 'shorten', but `{name}` of the dynamics is a schedule with a value for each of "
                f"{problem.num_steps} inner steps: it does not fit fewer. Use 'skip', or one value for all steps."
            )


def finite_step(
    take: Callable[[BilevelProblem], T],
    problem: BilevelProblem,
    state: OuterState,
    *,
    on_non_finite: OnNonFinite,
    most: int,
) -> T | None:
    """Returns what `take` returns of a problem, by the policy for NaN and infinity; None for a step that is skipped.

    Each step that is skipped or shortened counts once, in `state.non_finite_steps`, and gives a `NonFiniteWarning`.

    Cost: nothing while all is finite. A shortened step is computed again for each horizon that is tried: up to where
    the first NaN appeared, and half as long if that is not finite either.

    Args:
        take: computes the step; it changes nothing.
        problem: the problem of the step.
        state: where the run stands.
        on_non_finite: the policy.
        most: steps that may be skipped or shortened in all.

    Raises:
        NonFiniteError: if the policy is "raise", the limit is passed, the outer variables are not finite themselves,
            or no horizon is short enough, or the backend refuses a short one.
    """
    try:
        return take(problem)
    except NonFiniteError as error:
        # Of outer variables that are lost already, no later step can be computed.
        if on_non_finite == "raise" or not tree.all_finite(state.hparams.values()):
            raise
        _count(error, state, most)
        if on_non_finite == "skip":
            _warn(f"{error} The step is skipped", state, most)
            return None
        found, horizon = _shortened(take, problem, error)
        _warn(f"{error} The step is taken over {horizon} of {problem.num_steps} inner steps", state, most)
        return found


def _shortened(take: Callable[[BilevelProblem], T], problem: BilevelProblem, error: NonFiniteError) -> tuple[T, int]:
    """Returns what `take` returns over the longest horizon of those tried, and that horizon."""
    horizon = problem.num_steps
    while True:
        before = error.inner_step
        horizon = before if before is not None and before < horizon else horizon // 2
        if horizon < 1:
            raise error
        try:
            return take(replace(problem, num_steps=horizon)), horizon
        except NonFiniteError as again:
            error = again
        except IncompatibleBackendError as refusal:
            raise NonFiniteError(
                f"{error} The step cannot be taken over {horizon} of {problem.num_steps} inner steps either: {refusal} "
                "Or use `on_non_finite='skip'`.",
                inner_step=error.inner_step,
            ) from refusal


def _count(error: NonFiniteError, state: OuterState, most: int) -> None:
    if state.non_finite_steps >= most:
        raise NonFiniteError(
            f"{error} {most} outer steps of this kind were skipped or shortened before, as many as `most_non_finite` "
            "allows: the run does not go on. Mend the cause, or raise `most_non_finite`.",
            inner_step=error.inner_step,
        ) from error
    state.non_finite_steps += 1


def _warn(message: str, state: OuterState, most: int) -> None:
    text = f"{message}. It is number {state.non_finite_steps} of at most {most} such outer steps."
    warnings.warn(NonFiniteWarning(text), stacklevel=8)  # the caller of `run`
