"""How the problems of a run are executed: the one place where the configuration's words become the library's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import hypertorch as ht
from experiments.common.failures import ExpectedFailure
from hypertorch.problem import TaskRoute


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How problems are run; what they are and how they are differentiated is said elsewhere.

    Args:
        task_route: how the tasks of a batch are run: "vmap", "loop" or "auto".
        task_chunk: how many tasks at once; None for all.
        inner_dtype: the type of the inner loss's products; None for that of everything else.
    """

    task_route: TaskRoute
    task_chunk: int | None
    inner_dtype: torch.dtype | None

    def keywords(self) -> Mapping[str, Any]:
        """Returns the arguments of what makes problems with tasks, such as `Learner.on`."""
        return {"task_route": self.task_route, "task_chunk": self.task_chunk, "inner_dtype": self.inner_dtype}

    def of(self, problem: ht.BilevelProblem) -> ht.BilevelProblem:
        """Returns a problem that is run as the configuration says.

        Raises:
            ExpectedFailure: if it has no tasks, and the configuration says how tasks are run.
        """
        if problem.num_tasks is None:
            for name, value, default in (
                ("task_route", self.task_route, "auto"),
                ("task_chunk", self.task_chunk, None),
            ):
                if value != default:
                    raise ExpectedFailure(
                        f"`{name}` is {value!r}, but the problem of this experiment is one inner problem, not a batch "
                        "of tasks: it would have no effect. Leave it out."
                    )
        return replace(problem, **self.keywords())
