"""The plain forward run of the inner loop, without a hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.bound_problem import BoundProblem, join_tasks
from hypertorch.problem import BilevelProblem
from hypertorch.tasks import TaskSlice, resolve_task_route, task_slices
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
        carry: what a warm-started next run needs.
    """

    params: TensorDict
    outer_loss: Tensor
    metrics: TensorDict
    inner_losses: Tensor
    carry: TensorDict = field(default_factory=dict)


def unroll(
    problem: BilevelProblem, hparams: TensorDict, *, outer_step: int = 0, carry: TensorDict | None = None
) -> UnrollResult:
    """Returns the result of running the inner loop, without a hypergradient and without keeping a graph.

    Cost: `num_steps` steps; memory of one state and one step's graph.

    Args:
        problem: the problem.
        hparams: the outer variables.
        outer_step: chooses the outer data and the noise.
        carry: state to start from, for a warm-started problem.

    Raises:
        ValueError: if the problem's functions return what they must not (each message names the function).
    """
    bound = BoundProblem(problem, hparams, outer_step, carry)
    constants = tree.detach(hparams)

    def run(slices: list[TaskSlice | None]) -> UnrollResult:
        with bound.execution(), torch.no_grad():
            return _join([_unroll_slice(bound, constants, item) for item in slices], slices)

    return run(list(task_slices(problem, resolve_task_route(problem, "unroll", hparams, run))))


def _unroll_slice(bound: BoundProblem, hparams: TensorDict, task_slice: TaskSlice | None) -> UnrollResult:
    context = bound.context(hparams, task_slice)
    loop = bound.loop(task_slice, context)
    variables = {**hparams, **context}
    state = loop.initial(variables)
    losses: list[Tensor] = []
    step_terms: list[Tensor] = []
    for step in range(loop.num_steps):
        state, loss = loop.step_and_loss(state, variables, step)
        if loss is not None:
            losses.append(loss)
        if loop.has_step_loss:
            step_terms.append(loop.step_losses(state.params, variables, step))
    outer_loss = loop.outer_losses(state.params, variables) + sum(step_terms)
    return UnrollResult(
        params=state.params,
        outer_loss=outer_loss,
        metrics=loop.metrics(state.params, variables),
        inner_losses=torch.stack(losses, dim=-1) if losses else outer_loss.new_empty((*outer_loss.shape, 0)),
        carry=loop.carry_after(state),
    )


def _join(parts: list[UnrollResult], slices: list[TaskSlice | None]) -> UnrollResult:
    figures = join_tasks([{"outer_loss": part.outer_loss, "inner_losses": part.inner_losses} for part in parts], slices)
    return UnrollResult(
        params=join_tasks([part.params for part in parts], slices),
        metrics=join_tasks([part.metrics for part in parts], slices),
        carry=join_tasks([part.carry for part in parts], slices),
        **figures,
    )


def outer_metrics(
    problem: BilevelProblem, params: TensorDict, hparams: TensorDict, *, outer_step: int = 0
) -> dict[str, Tensor]:
    """Returns the outer problem's figures at given params, each a scalar: the mean over tasks.

    Cost: one evaluation of the context and of `OuterProblem.metrics`; no inner step.

    Args:
        problem: the problem.
        params: params as a hypergradient or an unroll returned them, with a tasks axis if the problem has tasks.
        hparams: the outer variables that these params were trained with.
        outer_step: chooses the outer data.
    """
    bound = BoundProblem(problem, hparams, outer_step, None)
    slices = list(task_slices(problem, "loop" if problem.task_route == "loop" else "vmap"))
    parts: list[TensorDict] = []
    with bound.execution(), torch.no_grad():
        for item in slices:
            context = bound.context(hparams, item)
            own = params if item is None else item.take(params)
            parts.append(bound.loop(item, context).metrics(own, {**hparams, **context}))
    return {name: value.to(torch.get_default_dtype()).mean() for name, value in join_tasks(parts, slices).items()}
