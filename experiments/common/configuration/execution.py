"""How the problems of a run are executed: the one place where the configuration's words become the library's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast, get_args

import torch
from omegaconf import DictConfig

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.readers import inner_dtype, one_of, optional, whole_number
from experiments.common.configuration.typed_settings import setting
from hypertorch.inner.execution import TaskRoute


def _task_route(config: DictConfig, key: str) -> TaskRoute:
    return cast("TaskRoute", one_of(config, key, get_args(TaskRoute)))


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """How problems are run; what they are and how they are differentiated is said elsewhere.

    Args:
        tasks: how the tasks of a batch are run: "vmap", "loop" or "auto".
        chunk: how many tasks at once; None for all.
        inner_dtype: the type of the inner loss's products; None for that of everything else.
    """

    tasks: TaskRoute = setting(_task_route)
    chunk: int | None = setting(optional(partial(whole_number, minimum=1, purpose="it is the most tasks run at once")))
    inner_dtype: torch.dtype | None = setting(inner_dtype)

    def of(self, source: ht.ProblemSource) -> ht.Execution:
        """Returns how the problems of a source are run.

        Raises:
            ExpectedFailure: if they have no tasks, and the configuration says how tasks are run.
        """
        if isinstance(source, ht.BilevelProblem) and source.num_tasks is None:
            for name, value, default in (("tasks", self.tasks, "auto"), ("chunk", self.chunk, None)):
                if value != default:
                    raise ExpectedFailure(
                        f"`execution.{name}` is {value!r}, but the problem of this experiment is one inner problem, "
                        "not a batch of tasks: it would have no effect. Leave it out."
                    )
        return ht.Execution(tasks=self.tasks, chunk=self.chunk, inner_dtype=self.inner_dtype)
