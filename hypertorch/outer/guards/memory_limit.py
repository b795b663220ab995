"""Batches of tasks that do not fit into memory are run in smaller chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from hypertorch.checks.values import is_out_of_memory
from hypertorch.inner.execution import Execution

T = TypeVar("T")


def within_memory(
    compute: Callable[[Execution], T], execution: Execution, num_tasks: Callable[[], int | None]
) -> tuple[T, Execution]:
    """Returns what `compute` returns, and the execution that it was computed with: with half the chunk until it fits.

    Args:
        compute: computes something of a batch of tasks; it changes nothing.
        execution: how it is run first.
        num_tasks: returns how many tasks the batch has, None for a problem without tasks, which cannot be divided;
            asked only where something does not fit.

    Raises:
        RuntimeError: PyTorch's own, if a single task does not fit.
    """
    while True:
        try:
            return compute(execution), execution
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            chunk = _chunk(execution, num_tasks())
            if chunk < 2:
                raise
        # Outside of the handler: the exception holds the frames, and with them the tensors, of what did not fit.
        execution = replace(execution, chunk=(chunk + 1) // 2)
        warnings.warn(
            f"{chunk} tasks at once do not fit into memory: `chunk` of the execution is {execution.chunk} from here "
            "on. Results agree up to rounding. Pass that `chunk` from the start to have none of this.",
            stacklevel=11,  # the caller of `run`, of an outer step
        )


def _chunk(execution: Execution, num_tasks: int | None) -> int:
    """Returns how many tasks are run at once."""
    if num_tasks is None or execution.tasks == "loop":
        return 1
    return num_tasks if execution.chunk is None else min(execution.chunk, num_tasks)
