"""A problem at one outer step: its data drawn, its context and inner loops ready to be made for any of its tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hypertorch.autodiff.missing_derivatives import second_order
from hypertorch.autodiff.noise import preserved_generators, seed_generators
from hypertorch.checks.values import check_hparams
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.inner.loop import CONTEXT, InnerLoop, inner_loop
from hypertorch.inner.tasks import TaskSlice, check_tasks_axis
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict


class BoundProblem:
    """A problem at one outer step: its outer data drawn and its arguments validated, once.

    Args:
        problem: the problem.
        hparams: the outer variables; only names, shapes and the device are kept.
        outer_step: chooses the outer data and the noise.
        carry: state of all tasks to start from (warm start); empty to start afresh.
        execution: how the problem is run. Its `tasks` play no role here: the caller chooses the slices.

    Raises:
        TypeError: if `hparams` is no dictionary of floating-point tensors, or `execution` is none.
        ValueError: if `allow_unused` names no hyperparameter, the outer data lacks the tasks axis, a carry meets a
            problem that starts afresh, or `inner_dtype` one without an inner step.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        hparams: TensorDict,
        outer_step: int,
        carry: TensorDict | None,
        execution: Execution = DEFAULT,
    ) -> None:
        if not isinstance(execution, Execution):
            raise TypeError(
                f"`execution` is {execution!r}, not an `Execution`: it says how tasks are run, and in what precision. "
                "Pass one, for example `ht.Execution(tasks='loop')`."
            )
        if execution.inner_dtype is not None and problem.num_steps == 0:
            raise ValueError(
                f"`inner_dtype` of the execution is {execution.inner_dtype}, but the problem takes no inner step: "
                "there is no inner loss to compute in it, and nothing would change. Leave `inner_dtype` out."
            )
        self.problem = problem
        self.execution = execution
        self.device = check_hparams(hparams)
        unknown = sorted(set(problem.allow_unused) - hparams.keys())
        if unknown:
            raise ValueError(
                f"`allow_unused` names {unknown}, which are not among the hyperparameters {sorted(hparams)}: a "
                "misspelt name would allow nothing. Correct it or leave it out."
            )
        if isinstance(outer_step, bool) or not isinstance(outer_step, int) or outer_step < 0:
            raise ValueError(
                f"`outer_step` is {outer_step!r}: it counts outer steps, and chooses the outer data and the noise. "
                "Pass a whole number of at least 0."
            )
        self._outer_step = outer_step
        if carry is not None and not isinstance(carry, Mapping):
            raise TypeError(
                f"`carry` is {carry!r}, a {type(carry).__name__}: a run goes on from the inner state of another one. "
                "Pass `result.carry` of that run, or None to start anew."
            )
        self._carry = carry or {}
        if self._carry and not problem.warm_start:
            raise ValueError(
                f"`carry` holds {sorted(self._carry)}, but the problem has `warm_start=False`: every run starts from "
                "`init_params`. Pass `carry=None`, or set `warm_start=True`."
            )
        # Drawn once: all slices of tasks, and all runs of a backend, see the same outer data.
        self._outer_batch = problem.outer.batch(outer_step)
        if problem.num_tasks is not None:
            check_tasks_axis("OuterProblem.batch", self._outer_batch, problem.num_tasks)

    def drawn_again(self, hparams: TensorDict) -> BoundProblem:
        """Returns the same problem at the same outer step, with its outer data drawn anew."""
        return BoundProblem(self.problem, hparams, self._outer_step, self._carry, self.execution)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Surrounds a run: differentiable attention, and torch's generators left as they were found."""
        # The fused kernels of attention have no second derivative. The generators belong to the user: a run puts their
        # state back.
        with second_order(), preserved_generators(self.device):
            yield

    def context(self, hparams: TensorDict, task_slice: TaskSlice | None) -> TensorDict:
        """Returns the context of some tasks, in the form that they are run in, with its graph into `hparams`.

        Raises:
            ValueError: if an entry has the name of a hyperparameter, or lacks its tasks axis.
        """
        problem = self.problem
        if problem.context is None:
            return {}
        first = 0 if task_slice is None else task_slice.start
        # The loop, which seeds all other noise, is not made yet: it needs the context.
        seed_generators(self.device, problem.seed, self._outer_step, first, CONTEXT)
        batch = self._outer_batch if task_slice is None else task_slice.keep_axis(self._outer_batch)
        context = problem.context(hparams, batch)
        if not isinstance(context, dict):
            raise TypeError(
                f"`context` returned a {type(context).__name__}: the losses read its tensors by name. Return a flat "
                "dict from names to tensors."
            )
        clash = sorted(context.keys() & hparams.keys())
        if clash:
            raise ValueError(
                f"`context` returned {clash}, which are names of hyperparameters too: the losses could not tell them "
                "apart. Rename the entries of the context."
            )
        if task_slice is None:
            return context
        per_task = {name: value for name, value in context.items() if name not in problem.shared_context}
        running = task_slice.stop - task_slice.start
        for name, value in per_task.items():
            if running != problem.num_tasks and value.dim() and len(value) == problem.num_tasks:
                raise ValueError(
                    f"`context` returned {name!r} of shape {tuple(value.shape)}, with an entry for each of `num_tasks` "
                    f"= {problem.num_tasks} tasks, but {running} of them are run at once, and `batch` has the data of "
                    "these alone. Return the rows that belong to `batch`: let the outer batch hold the number of each "
                    "task, and index with it."
                )
        check_tasks_axis("context", per_task, running)
        return {name: task_slice.drop_axis(value) if name in per_task else value for name, value in context.items()}

    def loop(self, task_slice: TaskSlice | None, context: TensorDict) -> InnerLoop:
        """Returns the inner loop of some tasks, given (the names of) their context."""
        outer_batch, carry = self._outer_batch, self._carry
        if task_slice is not None:
            outer_batch = task_slice.take(outer_batch)
            # What belongs to the hyperparameters, and the index, is the same for all tasks.
            carry = {name: value if _is_shared(name) else task_slice.take(value) for name, value in carry.items()}
        first_task = 0 if task_slice is None else task_slice.start
        return inner_loop(
            self.problem,
            outer_batch=outer_batch,
            tasks=task_slice,
            context=frozenset(context),
            noise_key=(self.problem.seed, self._outer_step, first_task),
            device=self.device,
            carry=carry,
            inner_dtype=self.execution.inner_dtype,
            # Tasks are shared among processes as a whole.
            ranks=self.execution.ranks if self.problem.num_tasks is None else None,
        )


def join_tasks(parts: list[TensorDict], slices: list[TaskSlice | None]) -> TensorDict:
    """Returns tensors of all tasks from those of their slices; the shared entries of a carry are the same for all.

    Args:
        parts: one dictionary per slice, in the form that the slice was run in.
        slices: the slices; a single None for a problem without tasks.
    """
    # One slice is handed on as it is: joining it would copy the params.
    if len(parts) == 1 and (slices[0] is None or not slices[0].squeeze):
        return parts[0]

    def join(name: str) -> Tensor:
        values = [part[name] for part in parts]
        if _is_shared(name):
            return values[0]
        return torch.cat(
            [
                value[None] if item is not None and item.squeeze else value
                for value, item in zip(values, slices, strict=True)
            ]
        )

    return {name: join(name) for name in parts[0]}


def _is_shared(name: str) -> bool:
    """Returns whether an entry of a carry has no tasks axis."""
    return name == "index" or name.startswith("shared.")
