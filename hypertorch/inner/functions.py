"""The functions that a problem is made of, as the inner loop calls them: checked, and lifted to a batch of tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypertorch.autodiff.stopped_gradients import stopping_tangents
from hypertorch.checks.values import check_buffers, check_scalar
from hypertorch.inner.precision import in_precision
from hypertorch.inner.tasks import lift
from hypertorch.problem import BilevelProblem, InnerProblem, OuterProblem
from hypertorch.types import Batch, TensorDict


class LoopFunctions(NamedTuple):
    """The functions that a problem is made of, with the tasks axis bound: `(params, hparams, batch) -> ...`.

    Attributes:
        initial: the first params.
        inner: the inner loss and the new values of the buffers.
        outer: the outer loss.
        metrics: what is reported of a run.
        term: the term of the outer loss at an inner step, `(params, hparams, batch, index) -> term`, where there are
            terms.
    """

    initial: Callable[[TensorDict, TensorDict, Batch], TensorDict]
    inner: Callable[[TensorDict, TensorDict, Batch], tuple[Tensor, TensorDict]]
    outer: Callable[[TensorDict, TensorDict, Batch], Tensor]
    metrics: Callable[[TensorDict, TensorDict, Batch], TensorDict]
    term: Callable[[TensorDict, TensorDict, Batch, int], Tensor]


def loop_functions(
    problem: BilevelProblem,
    num_tasks: int | None,
    context: frozenset[str],
    per_task: frozenset[str],
    inner_dtype: torch.dtype | None,
) -> LoopFunctions:
    """Returns the functions of a problem.

    Args:
        problem: the problem.
        num_tasks: length of the tasks axis; None without one.
        context: names of the variables that are the context's.
        per_task: those of them that have a tasks axis.
        inner_dtype: of the inner loss's products; None for that of the params.
    """
    initial = partial(_initial_params, _asked(problem.inner, "init_params", context))
    inner = partial(_inner_loss, _asked(problem.inner, "loss", context), problem.inner.buffers)
    if inner_dtype is not None:
        inner = partial(in_precision, inner, inner_dtype)
    outer = partial(_outer_loss, _asked(problem.outer, "loss", context), "OuterProblem.loss")
    metrics = _asked(problem.outer, "metrics", context)
    step_loss = partial(_outer_loss, _asked(problem.outer, "step_loss", context), "OuterProblem.step_loss")
    term = partial(_at_index, step_loss, num_tasks, per_task)
    if num_tasks is not None:
        initial = lift(initial, num_tasks, per_task)
        inner = lift(inner, num_tasks, per_task)
        outer = lift(outer, num_tasks, per_task)
        metrics = lift(metrics, num_tasks, per_task)
    return LoopFunctions(initial, inner, outer, metrics, term)


def _asked(problem: InnerProblem | OuterProblem, method: str, context: frozenset[str]) -> Callable[..., Any]:
    """Returns a method that finds the context among the variables, also where it asks for it apart from them."""
    function = getattr(problem, method)
    if method not in problem.asks_for_context:
        return function
    position = 0 if method == "init_params" else 1  # of the variables among the arguments

    def with_context(*arguments: Any) -> Any:
        variables = arguments[position]
        hparams = {name: value for name, value in variables.items() if name not in context}
        own = {name: value for name, value in variables.items() if name in context}
        return function(*arguments[:position], hparams, *arguments[position + 1 :], context=own)

    return with_context


# What the user wrote is called by way of `stopping_tangents`: forward mode goes on through `torch.no_grad()` and
# `.data`, and would differ from reverse mode.
def _initial_params(
    init_params: Callable[[TensorDict], TensorDict], _: TensorDict, variables: TensorDict, __: Batch
) -> TensorDict:
    return stopping_tangents(init_params)(variables)


def _inner_loss(
    loss: Callable[..., Any], buffers: tuple[str, ...], params: TensorDict, variables: TensorDict, batch: Batch
) -> tuple[Tensor, TensorDict]:
    result = stopping_tangents(loss)(params, variables, batch)
    value: Any
    # A tuple of another length is no scalar either.
    value, new_buffers = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    check_scalar(value, "InnerProblem.loss")
    if new_buffers or buffers:
        check_buffers(new_buffers, buffers)
    return value, new_buffers


def _outer_loss(
    loss: Callable[..., Any], source: str, params: TensorDict, variables: TensorDict, batch: Batch, *index: int
) -> Tensor:
    value = stopping_tangents(loss)(params, variables, batch, *index)
    check_scalar(value, source)
    return value


def _at_index(
    step_loss: Callable[..., Tensor],
    num_tasks: int | None,
    per_task: frozenset[str],
    params: TensorDict,
    variables: TensorDict,
    batch: Batch,
    index: int,
) -> Tensor:
    """Returns the term of the outer loss after a step, shape `()` or `(tasks,)`."""

    def at(params: TensorDict, variables: TensorDict, batch: Batch) -> Tensor:
        return step_loss(params, variables, batch, index)

    return lift(at, num_tasks, per_task)(params, variables, batch)
