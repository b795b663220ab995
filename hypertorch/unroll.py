"""The plain forward run of the inner loop, without a hypergradient."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import check_metrics
from hypertorch.hypergradients.guards.examination import examine
from hypertorch.inner.bound_problem import BoundProblem, join_tasks
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.inner.kinds import kind_of
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.inner.tasks import TaskSlice, measured, own_slices, task_slices
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class UnrollResult:
    """A plain run of the inner loop.

    Attributes:
        params: the last params, with a leading tasks axis if the problem has tasks.
        outer_loss: the outer loss at them, with the terms at inner steps if the problem has any, shape `()` or
            `(tasks,)`.
        metrics: the outer problem's figures, each of shape `()` or `(tasks,)`.
        inner_losses: the inner loss before each step, shape `(steps,)` or `(tasks, steps)`.
        metrics_after: the outer problem's figures after the steps that `metrics_after` of `unroll` asked for, each of
            shape `(asked,)` or `(tasks, asked)`; empty if it asked for none.
        carry: what a warm-started next run needs.
    """

    params: TensorDict
    outer_loss: Tensor
    metrics: TensorDict
    inner_losses: Tensor
    metrics_after: TensorDict = field(default_factory=dict)
    carry: TensorDict = field(default_factory=dict)


@typed("problem", "metrics_after")
def unroll(
    problem: BilevelProblem,
    hparams: TensorDict,
    *,
    outer_step: int = 0,
    carry: TensorDict | None = None,
    metrics_after: Collection[int] = (),
    execution: Execution = DEFAULT,
) -> UnrollResult:
    """Returns the result of running the inner loop, without a hypergradient and without keeping a graph.

    Cost: `num_steps` steps, and one evaluation of the metrics for each of `metrics_after`; memory of one state and one
    step's graph. Tasks that are vectorised are compared with one task alone first, once for every kind of problem.

    Args:
        problem: the problem.
        hparams: the outer variables.
        outer_step: chooses the outer data and the noise.
        carry: state to start from, for a warm-started problem.
        metrics_after: numbers of steps after which the outer problem's figures are wanted too, from 0 (before the first
            step) to `num_steps`, ascending.
        execution: how the problem is run. This process runs all of it, whatever `ranks` there are.

    Raises:
        ValueError: if `metrics_after` is out of range or not ascending, or the problem's functions return what they
            must not (each message names the function).
        ReplayError: if a function of the problem changes its arguments.
        IncompatibleBackendError: if tasks are vectorised, and an operation differs from a task alone or cannot be.
    """
    asked = tuple(metrics_after)
    # One comparison for three mistakes: a set holds each number once, in range, and comes back in order.
    if list(asked) != sorted({step for step in asked if 0 <= step <= problem.num_steps}):
        raise ValueError(
            f"`metrics_after` is {asked}: figures can be taken after 0 to {problem.num_steps} steps of this problem, "
            "in the order of the run. Pass ascending numbers from that range, each once."
        )
    bound = BoundProblem(problem, hparams, outer_step, carry, execution)
    if execution.ranks is not None:
        execution = replace(execution, ranks=None)
    # No path to the hyperparameters: a step's graph goes as soon as its gradient is there.
    constants = tree.detach(hparams)
    kind = kind_of(problem)

    look = partial(examine, bound, hparams, kind=kind, use="run")

    def run(slices: list[TaskSlice | None]) -> UnrollResult:
        with bound.running(), torch.no_grad():
            return _join([_unroll_slice(bound, constants, item, asked) for item in slices], slices)

    slices = task_slices(problem.num_tasks, measured(execution, problem, ("unroll", kind), hparams, look, run))
    look(slices[0])
    return run(slices)


def _unroll_slice(
    bound: BoundProblem, hparams: TensorDict, task_slice: TaskSlice | None, metrics_after: tuple[int, ...]
) -> UnrollResult:
    context = bound.context(hparams, task_slice)
    loop = bound.loop(task_slice, context)
    variables = {**hparams, **context}
    step_terms: list[Tensor] = []
    figures: list[TensorDict] = []

    def advance(state: InnerState, step: int) -> InnerState:
        # Not `loop.step`, whose term is the mean over tasks: here each task's own is wanted.
        state = loop.advance(state, variables, step)
        terms = loop.term(state, variables, step, of_each_task=True)
        step_terms.extend([] if terms is None else [terms])
        return state

    def look(state: InnerState, steps_done: int) -> None:
        if steps_done in metrics_after:
            figures.append(_metrics(loop, state.params, variables))

    state = scan(advance, loop.initial(variables), range(loop.num_steps), look)
    # `scan` shows the state before each step, and never the last one.
    look(state, loop.num_steps)
    losses = list(loop.record.losses.values())
    outer_loss = loop.outer(state.params, variables, of_each_task=True) + sum(step_terms)
    return UnrollResult(
        params=state.params,
        outer_loss=outer_loss,
        metrics=_metrics(loop, state.params, variables),
        # Steps last: slices are joined along the first axis, that of the tasks.
        inner_losses=torch.stack(losses, dim=-1) if losses else outer_loss.new_empty((*outer_loss.shape, 0)),
        metrics_after={name: torch.stack([row[name] for row in figures], dim=-1) for name in figures[0]}
        if figures
        else {},
        carry=loop.carry_after(state),
    )


def _metrics(loop: InnerLoop, params: TensorDict, variables: TensorDict) -> TensorDict:
    """Returns the figures at copies: what `OuterProblem.metrics` changes is not the run's."""
    metrics = loop.metrics(
        {name: value.clone() for name, value in params.items()},
        {name: value.clone() for name, value in variables.items()},
    )
    check_metrics(metrics, () if loop.num_tasks is None else (loop.num_tasks,))
    return metrics


def _join(parts: list[UnrollResult], slices: list[TaskSlice | None]) -> UnrollResult:
    figures = join_tasks([{"outer_loss": part.outer_loss, "inner_losses": part.inner_losses} for part in parts], slices)
    return UnrollResult(
        params=join_tasks([part.params for part in parts], slices),
        metrics=join_tasks([part.metrics for part in parts], slices),
        metrics_after=join_tasks([part.metrics_after for part in parts], slices),
        carry=join_tasks([part.carry for part in parts], slices),
        **figures,
    )


def outer_metrics(
    problem: BilevelProblem,
    params: TensorDict,
    hparams: TensorDict,
    *,
    outer_step: int = 0,
    execution: Execution = DEFAULT,
) -> dict[str, Tensor]:
    """Returns the outer problem's figures at given params, each a scalar: the mean over tasks.

    Cost: one evaluation of the context and of `OuterProblem.metrics`; no inner step.

    Args:
        problem: the problem.
        params: params as a hypergradient or an unroll returned them, with a tasks axis if the problem has tasks; with
            `ranks` in the execution those of this process's tasks, and the mean is over the tasks of all.
        hparams: the outer variables that these params were trained with.
        outer_step: chooses the outer data.
        execution: how the problem is run.

    Raises:
        ValueError: if a metric is not one figure per task.
    """
    bound = BoundProblem(problem, hparams, outer_step, None, execution)

    def over(slices: list[TaskSlice | None], places: list[TaskSlice | None]) -> TensorDict:
        parts: list[TensorDict] = []
        with bound.running(), torch.no_grad():
            for item, place in zip(slices, places, strict=True):
                context = bound.context(hparams, item)
                # The given params stand for a run's end: no inner loop is run for them.
                own = params if place is None else place.take(params)
                parts.append(_metrics(bound.loop(item, context), own, {**hparams, **context}))
        return join_tasks(parts, slices)

    ranks, num_tasks = execution.ranks, problem.num_tasks
    if ranks is None or num_tasks is None:
        slices = task_slices(num_tasks, execution)
        metrics = over(slices, slices)
    else:
        slices, places = own_slices(num_tasks, execution), task_slices(len(ranks.share(num_tasks)), execution)
        metrics = tree.concatenate(ranks.objects(lambda: over(slices, places)))
    # A count is an integer, of which PyTorch takes no mean.
    return {name: value.to(torch.get_default_dtype()).mean() for name, value in metrics.items()}
