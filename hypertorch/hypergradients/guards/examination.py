"""What is looked at before a problem's numbers are trusted: once for each kind of problem, on its first task."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, TypeAlias

from hypertorch.hypergradients.guards.faulty_operations import refuse_faulty_operations
from hypertorch.hypergradients.guards.first_task import FirstTask
from hypertorch.hypergradients.guards.side_effects import refuse_changed_arguments, refuse_side_effects
from hypertorch.hypergradients.guards.vectorised_tasks import refuse_wrong_vectorisation
from hypertorch.inner import memo
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.tasks import TaskSlice
from hypertorch.types import TensorDict

Use: TypeAlias = Literal["run", "values", "first", "second"]
"""What a problem is used for: one plain run, the difference of runs, first derivatives, or second ones too."""

SOUND = "problems in which nothing was found wrong"


def examine(bound: BoundProblem, hparams: TensorDict, item: TaskSlice | None, *, kind: Hashable, use: Use) -> None:
    """Raises if a problem's functions, or PyTorch's derivatives of them, would make a number wrong in silence.

    Functions must leave their arguments as they are. Where runs are compared or differentiated, they must be functions
    of their arguments, and do nothing that a derivative misses. Tasks that are vectorised must come out as they do
    alone, and second derivatives must be ones that PyTorch is not known to get wrong.

    Cost: nothing for a kind of problem that was found sound. Else, on the first task, about five evaluations of each
    function, with some derivatives where derivatives are used; and two of the tasks together if they are vectorised.

    Args:
        bound: the problem.
        hparams: the outer variables.
        item: the first tasks that are run, together or one; None for a problem without tasks.
        kind: what is the same for problems that run the same code.
        use: what the problem is used for.

    Raises:
        ReplayError: if something differs when it is evaluated again, or a function changes its arguments.
        IncompatibleBackendError: if a derivative would miss a path, or is wrong or missing in PyTorch.
        NotVectorisableError: if vectorised tasks differ from a task alone, or cannot be vectorised.
    """
    # A problem without steps says nothing of the same one with some, nor a use of another: a run by values must not
    # fail where there is no derivative.
    case = (kind, item is not None and not item.squeeze, bound.problem.num_steps > 0, tuple(hparams))

    def look() -> None:
        _look(FirstTask(bound=bound, hparams=hparams, item=item), use)
        memo.note(SOUND, (case, "run"), None)  # every use looks at what a plain run needs

    memo.recall(SOUND, (case, use), look)


def _look(first: FirstTask, use: Use) -> None:
    with first.bound.running():
        loop, variables = first.loop()
        refuse_changed_arguments(loop, variables)
        # In one plain run nothing is differentiated or run again, so that other side effects do no harm.
        if use != "run":
            refuse_side_effects(first, use)
        if use == "second" and loop.num_steps:
            refuse_faulty_operations(loop, variables)
        if first.among_others:
            refuse_wrong_vectorisation(first, "values" if use == "run" else use)
