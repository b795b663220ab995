"""The tasks axis: which tasks are run together, and functions of one task lifted to a batch of tasks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode, resolve_name

from hypertorch import tree
from hypertorch.autodiff.missing_derivatives import NotVectorisableError
from hypertorch.inner.execution import Execution
from hypertorch.inner.memo import recall
from hypertorch.problem import BilevelProblem
from hypertorch.types import Batch, TensorDict

_logger = logging.getLogger(__name__)

TASKS = "how tasks are run"


@dataclass(frozen=True, kw_only=True)
class TaskSlice:
    """The tasks `start .. stop - 1` of a batch, run together.

    Args:
        start: first task.
        stop: one past the last.
        squeeze: drop the tasks axis, for a slice of one task that is run like a single problem.
        whole: the slice is the whole batch, which then is not copied or viewed.
    """

    start: int
    stop: int
    squeeze: bool = False
    whole: bool = False

    @property
    def num_tasks(self) -> int | None:
        """Length of the tasks axis that the slice's tensors have; None without one."""
        return None if self.squeeze else self.stop - self.start

    def keep_axis(self, batch: Batch) -> Batch:
        """Returns this slice's part of a batch, with a tasks axis."""
        return batch if self.whole else tree.map_batch(lambda value: value[self.start : self.stop], batch)

    def take(self, batch: Batch) -> Batch:
        """Returns this slice's part of a batch, in the form that the slice is run in."""
        if self.squeeze:
            return tree.map_batch(lambda value: value[self.start], batch)
        return self.keep_axis(batch)

    def drop_axis(self, value: Tensor) -> Tensor:
        """Returns a tensor of this slice (with a tasks axis) in the form that the slice is run in."""
        return value[0] if self.squeeze else value


def task_slices(num_tasks: int | None, execution: Execution) -> list[TaskSlice | None]:
    """Returns the slices of a task batch in the order they are run; a single None for a problem without tasks.

    Args:
        num_tasks: of the problem.
        execution: by "loop" one task at a time, without a tasks axis; else chunks of tasks.
    """
    if num_tasks is None:
        return [None]
    if execution.tasks == "loop":
        return [TaskSlice(start=task, stop=task + 1, squeeze=True) for task in range(num_tasks)]
    size = min(execution.chunk or num_tasks, num_tasks)
    return [
        TaskSlice(start=start, stop=min(start + size, num_tasks), whole=size == num_tasks)
        for start in range(0, num_tasks, size)
    ]


def own_slices(num_tasks: int, execution: Execution) -> list[TaskSlice | None]:
    """Returns the slices of those tasks of a batch that this process takes, in the order they are run."""
    if execution.ranks is None:
        return task_slices(num_tasks, execution)
    own = execution.ranks.share(num_tasks)
    return [
        replace(item, start=own.start + item.start, stop=own.start + item.stop, whole=len(own) == num_tasks)
        for item in task_slices(len(own), execution)
        if item is not None
    ]


def check_tasks_axis(what: str, batch: Batch, num_tasks: int) -> None:
    """Raises `ValueError` if a tensor of a batch lacks the leading tasks axis."""
    for value in tree.batch_tensors(batch):
        if value.dim() == 0 or value.shape[0] != num_tasks:
            raise ValueError(
                f"`{what}` has a tensor of shape {tuple(value.shape)}, but `num_tasks` = {num_tasks}: with tasks, the "
                "first axis of every tensor counts them. Stack the tasks' data, or set `num_tasks=None`."
            )


def lift(
    function: Callable[[TensorDict, TensorDict, Batch], Any], num_tasks: int | None, per_task: frozenset[str]
) -> Callable[[TensorDict, TensorDict, Batch], Any]:
    """Returns `function(params, hparams, batch)` of one task as a function of a batch of tasks.

    Only the function is vectorised; its derivative is taken from outside by autograd, on the sum over tasks, which is
    exact for every layer. (The derivative *over* a `vmap` that holds an inner `torch.func.grad` is silently wrong for
    batch, layer and instance norms with a learnt scale.)

    Args:
        function: of one task.
        num_tasks: length of the tasks axis of params and batch; None leaves the function as it is.
        per_task: names in `hparams` (entries of the context) that have a tasks axis; all others are shared.

    Raises:
        NotVectorisableError: (from the lifted function) naming the operation, if PyTorch cannot vectorise it.
    """
    if num_tasks is None:
        return function

    def over_tasks(params: TensorDict, hparams: TensorDict, batch: Batch) -> Any:
        data, rebuild = tree.flatten_batch(batch)
        own = [name for name in hparams if name in per_task]
        # An index of the tasks where there is nothing else to vectorise over.
        index = [] if params or own or data else [torch.arange(num_tasks)]
        after_own = len(params) + len(own)

        # Flat arguments: `vmap` walks through nested ones several times.
        def one_task(*values: Tensor) -> Any:
            own_hparams = dict(zip(own, values[len(params) : after_own], strict=True))
            return function(
                dict(zip(params, values[: len(params)], strict=True)),
                {**hparams, **own_hparams},
                rebuild(values[after_own : after_own + len(data)]),
            )

        values = (*params.values(), *(hparams[name] for name in own), *data, *index)
        # "different": each task draws noise of its own, as it does where tasks run one by one.
        together = vmap(one_task, randomness="different")
        try:
            return together(*values)
        except _ERRORS as error:
            explained = _explained(error, lambda: together(*values), lambda: one_task(*(value[0] for value in values)))
            if explained is None:
                raise
            raise explained from error

    return over_tasks


# What PyTorch raises of an operation. Running out of memory is no fault of the operation, although a `RuntimeError`.
_ERRORS = (RuntimeError, IndexError, ValueError)


def _explained(
    error: Exception, together: Callable[[], object], alone: Callable[[], object]
) -> NotVectorisableError | None:
    """Returns the error to raise where vectorised tasks failed; None if the problem itself is at fault.

    Args:
        error: what vectorised tasks raised.
        together: runs them again.
        alone: runs the first task, which fails too where the problem is at fault.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return None
    try:
        # An error of the problem itself is raised as it is, in its own words.
        alone()
    except _ERRORS:
        return None
    # Run again under the watch, which costs a Python call for every operation: too much for runs that work.
    watch = _FailureWatch()
    with watch, suppress(*_ERRORS):
        together()
    return not_vectorisable("an operation" if watch.failed is None else f"`{watch.failed}`", error)


def not_vectorisable(what: str, error: Exception) -> NotVectorisableError:
    """Returns the error for what works for a task alone, and not for tasks together.

    Args:
        what: the operation.
        error: what PyTorch raised.
    """
    said = (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")
    return NotVectorisableError(
        f"the inner problem cannot be vectorised (by vmap) over tasks. PyTorch says: {said} (in {what}, which works "
        "for a task alone)",
        "Run the tasks one by one with `execution=ht.Execution(tasks='loop')`.",
    )


class _FailureWatch(TorchFunctionMode):
    """Remembers the name of the first call into PyTorch that raised.

    Attributes:
        failed: the name, such as `torch.Tensor.to`; None if none raised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: str | None = None

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except _ERRORS:
            self.failed = self.failed or resolve_name(func) or getattr(func, "__name__", None)
            raise


_MEASURED_TASKS = 4
_REPEATS = 5  # the fastest of each counts: on a busy machine single times are several times too long
# A gain below this on a few tasks may become a loss on many tasks, whose memory outgrows the caches.
_CLEARLY = 2.0
# The least gain that makes the vectorised route worth the memory of all tasks at once.
_WORTH_ITS_MEMORY = 1.2
_REPEATS_OF_ALL = 2
_SECONDS_ENOUGH = 1.0  # times that take as long are told apart without a repetition


def measured(
    execution: Execution,
    problem: BilevelProblem,
    kind: Hashable,
    hparams: TensorDict,
    look: Callable[[TaskSlice | None], None],
    run: Callable[[list[TaskSlice | None]], object],
) -> Execution:
    """Returns the execution with "auto" replaced by the way to run tasks that a measurement found to be the faster.

    A few tasks of the problem are run in either way, after a warm-up; where the vectorised one wins, but not clearly,
    all tasks. The loop, which holds the memory of one task, is taken unless the other wins by a fifth, and where an
    operation cannot be vectorised, or comes out wrong. The answer is kept for problems of the same kind and sizes, and
    logged.

    Args:
        execution: what is asked for.
        problem: the problem; without tasks there is nothing to measure.
        kind: what is run (a backend, or a plain unroll) and the kind of problem: routes are measured for each.
        hparams: the outer variables.
        look: raises where tasks in the form of a slice would not come out right.
        run: runs the given slices.
    """
    if execution.tasks != "auto" or problem.num_tasks is None:
        return execution
    # Which way is faster depends on sizes and dtypes: a measurement serves no others.
    shapes = tuple((name, value.shape, value.dtype, value.device) for name, value in hparams.items())
    # Of several processes the first has the most tasks.
    num_tasks = problem.num_tasks if execution.ranks is None else len(execution.ranks.shares(problem.num_tasks)[0])
    sizes = (num_tasks, execution.chunk, execution.inner_dtype, problem.num_steps)
    key = (kind, sizes, shapes)
    chunk = execution.chunk
    return replace(execution, tasks=recall(TASKS, key, lambda: _faster_route(num_tasks, chunk, look, run)))


def _faster_route(
    num_tasks: int,
    chunk: int | None,
    look: Callable[[TaskSlice | None], None],
    run: Callable[[list[TaskSlice | None]], object],
) -> Literal["vmap", "loop"]:
    together = task_slices(num_tasks, Execution(tasks="vmap", chunk=chunk))
    one_by_one = task_slices(num_tasks, Execution(tasks="loop"))
    first = together[0]
    assert first is not None
    few = min(first.stop, _MEASURED_TASKS)
    some = TaskSlice(start=0, stop=few)
    # Where the problem is at fault, and not the route, it shows in one task alone.
    look(one_by_one[0])
    run(one_by_one[:1])
    try:
        run([some])
        count, (vectorised, looped) = few, _seconds(run, [some], one_by_one[:few], _REPEATS)
        if _WORTH_ITS_MEMORY * vectorised <= looped < _CLEARLY * vectorised and few < len(one_by_one):
            count, (vectorised, looped) = len(one_by_one), _seconds(run, together, one_by_one, _REPEATS_OF_ALL)
        route: Literal["vmap", "loop"] = "vmap" if looped >= _WORTH_ITS_MEMORY * vectorised else "loop"
        # To look at vectorised tasks takes longer than to run them, and only the winner is looked at.
        if route == "vmap":
            look(some)
    except RuntimeError as error:
        _logger.info("tasks run one by one: an operation cannot be vectorised (%s)", error)
        return "loop"
    _logger.info(
        "%d tasks took %.1f ms vectorised and %.1f ms one by one: tasks run by %r",
        count,
        1e3 * vectorised,
        1e3 * looped,
        route,
    )
    return route


def _seconds(
    run: Callable[[list[TaskSlice | None]], object],
    together: list[TaskSlice | None],
    one_by_one: list[TaskSlice | None],
    repeats: int,
) -> tuple[float, float]:
    """Returns the shortest time of each route, taken in turns."""
    turns: list[tuple[float, float]] = []
    # In turns, so that a machine that slows down meanwhile slows both.
    while len(turns) < repeats and sum(map(sum, turns)) < _SECONDS_ENOUGH:
        turns.append((_time(lambda: run(together)), _time(lambda: run(one_by_one))))
    return min(times[0] for times in turns), min(times[1] for times in turns)


def _time(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    # Kernels on a GPU run on after the call that starts them. Where CUDA is not in use, `synchronize` would start it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
