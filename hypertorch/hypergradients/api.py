"""The front door: one function that validates, runs a backend over the tasks and returns the hypergradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.products import vjp
from hypertorch.errors import NonFiniteError
from hypertorch.hypergradients.base import BlackBox, FirstDerivatives, Hypergradient, HypergradientResult
from hypertorch.hypergradients.guards.faulty_operations import refuse_faulty_operations
from hypertorch.hypergradients.guards.finiteness import first_non_finite, non_finite_hypergradient
from hypertorch.hypergradients.guards.reachability import check_reachability, known_reach, moved_by_values
from hypertorch.hypergradients.guards.side_effects import FirstTask, refuse_side_effects
from hypertorch.hypergradients.guards.vectorised_tasks import refuse_wrong_vectorisation
from hypertorch.hypergradients.reverse import Reverse
from hypertorch.hypergradients.reverse_mode.sweep import Grads, accumulate
from hypertorch.inner.bound_problem import BoundProblem, join_tasks
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.inner.kinds import kind_of
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.record import Cost
from hypertorch.inner.tasks import TaskSlice, measured, task_slices
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict


def hypergradient(
    problem: BilevelProblem,
    hparams: TensorDict,
    *,
    backend: Hypergradient,
    outer_step: int = 0,
    carry: TensorDict | None = None,
    execution: Execution = DEFAULT,
) -> HypergradientResult:
    """Returns the hypergradient `df/dhparams` of a bilevel problem as a value.

    A pure function: it writes no `.grad`, keeps no graph, leaves torch's generators as they were, and the same
    arguments give the same result. Entries of `hparams` need not require grad.

    The derivative is made of those of the operations, PyTorch's and your own. A `torch.autograd.Function` with a wrong
    backward pass, or one that keeps an intermediate result on `ctx` without `save_for_backward` (whose second
    derivative is then incomplete), looks like any other: `check_hypergradient` tells.

    Cost: that of the backend, for each slice of tasks in turn, plus one evaluation and one vjp of the context. The
    first problem of a kind (the same classes, functions, and modules in the same modes) is looked at for side effects
    before: its first step and its outer loss are evaluated twice, and must agree, and some derivatives are taken. That
    costs about ten evaluations of the losses on one task, and is not counted in `stats`.

    Args:
        problem: the problem.
        hparams: the outer variables.
        backend: how the hypergradient is computed.
        outer_step: chooses the outer data and the noise.
        carry: `carry` of the previous outer step's result; None or empty to start afresh.
        execution: how the problem is run.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the problem's functions return what they must not (each message names the function).
        DetachedHyperparameterError: if a hyperparameter has no path to the outer loss and is not in `allow_unused`.
        IncompatibleBackendError: if the backend cannot serve the problem, or drops every path from a hyperparameter.
        NonFiniteError: if NaN or infinity appears; names the inner step and the entry.
        ReplayError: if a function of the problem returns something else when it is evaluated again, or changes its
            arguments.
    """
    run = _Run(problem, hparams, backend, outer_step, carry, execution)
    slices = task_slices(problem.num_tasks, run.measured())
    # First of all: what depends on more than its arguments has no right derivative, by any backend.
    run.refuse_side_effects(slices[0])
    found, parts = run.over(slices)
    check_reachability(backend, found, problem.allow_unused, lambda: run.reached(slices))
    grads = {name: torch.zeros_like(hparams[name]) if value is None else value for name, value in found.items()}
    # By weight: the last chunk may hold fewer tasks than the others.
    outer_loss = torch.stack([part.outer_loss * part.weight for part in parts]).sum() / _total_weight(slices)
    figures = join_tasks([part.figures for part in parts], slices)
    # One look at the end. A look at every inner step costs 7 % of a small one.
    if not tree.all_finite([*grads.values(), outer_loss, *(part.inner_losses for part in parts)]):
        raise run.explain_non_finite(slices, grads, figures)
    return HypergradientResult(
        grads=grads,
        outer_loss=outer_loss,
        params=join_tasks([part.params for part in parts], slices),
        stats=sum((part.cost for part in parts), Cost()),
        carry=join_tasks([part.carry for part in parts], slices),
        figures=figures,
    )


def measured_execution(
    problem: BilevelProblem,
    hparams: TensorDict,
    *,
    backend: Hypergradient,
    outer_step: int = 0,
    execution: Execution = DEFAULT,
) -> Execution:
    """Returns the execution by which `hypergradient` runs a problem, with `tasks` measured if they are "auto".

    The outer loop asks once and writes the answer into its checkpoints, so that a resumed run is executed alike.

    Args:
        problem: the problem.
        hparams: the outer variables.
        backend: how the hypergradient is computed.
        outer_step: chooses the outer data and the noise.
        execution: what is asked for.
    """
    return _Run(problem, hparams, backend, outer_step, None, execution).measured()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """The result for one slice of tasks, without its hypergradient; `weight` counts them."""

    outer_loss: Tensor
    params: TensorDict
    carry: TensorDict
    figures: TensorDict
    cost: Cost
    inner_losses: Tensor
    weight: int


class _Run:
    """One call of `hypergradient`: what its slices of tasks share."""

    def __init__(
        self,
        problem: BilevelProblem,
        hparams: TensorDict,
        backend: Hypergradient,
        outer_step: int,
        carry: TensorDict | None,
        execution: Execution,
    ) -> None:
        _check_arguments(problem, backend)
        self._bound = BoundProblem(problem, hparams, outer_step, carry, execution)
        _check_allow_unused(problem, hparams)
        self._hparams = hparams
        self._backend = backend
        self._outer_step = outer_step
        self._carry = carry
        self._kind = kind_of(problem)

    def measured(self) -> Execution:
        """Returns the execution, its `tasks` measured if need be."""
        bound = self._bound
        return measured(bound.execution, bound.problem, (repr(self._backend), self._kind), self._hparams, self.over)

    def over(self, slices: list[TaskSlice | None]) -> tuple[Grads, list[_Part]]:
        """Returns the mean of the hypergradients over the tasks of these slices, and what else each slice gives.

        None stands for an entry that no task has a path from. One slice's hypergradient is held beside the sum.
        """
        mean: Grads = dict.fromkeys(self._hparams)
        parts: list[_Part] = []
        with self._bound.running():
            for item in slices:
                grads, part = self._slice(item, self._backend)
                parts.append(part)
                share = part.weight / _total_weight(slices)
                # A single slice is not multiplied by one, which would copy it.
                mean = accumulate(
                    mean,
                    {name: value if value is None or share == 1.0 else value * share for name, value in grads.items()},
                )
        return mean, parts

    def reached(self, slices: list[TaskSlice | None]) -> frozenset[str]:
        """Returns the names of the hyperparameters that reach the outer loss."""
        problem = self._bound.problem
        if isinstance(self._backend, BlackBox):
            return known_reach(
                problem, "values", self._hparams, lambda: moved_by_values(self._bound, self._hparams, slices)
            )
        return known_reach(problem, "autograd", self._hparams, lambda: self._reached_by_autograd(slices))

    def refuse_side_effects(self, item: TaskSlice | None) -> None:
        """Raises if the problem's functions are not functions of their arguments, or do what a derivative misses.

        Args:
            item: the first slice of the tasks, of which the first task is looked at.
        """
        first = FirstTask(bound=self._bound, hparams=self._hparams, item=item)
        with self._bound.running():
            refuse_side_effects(self._kind, first, by_values=isinstance(self._backend, BlackBox))

    def _reached_by_autograd(self, slices: list[TaskSlice | None]) -> frozenset[str]:
        reached: set[str] = set()
        with self._bound.running():
            for item in slices:
                # What one task shows for all hyperparameters, the others need not.
                if reached == self._hparams.keys():
                    break
                # In little memory: who asks may have taken a backend that fits where a whole graph does not.
                grads, _ = self._slice(item, Reverse(checkpoint_every="sqrt"))
                reached |= {name for name, value in grads.items() if value is not None}
        return frozenset(reached)

    def _refuse_faults(
        self,
        loop: InnerLoop,
        task_slice: TaskSlice | None,
        variables: TensorDict,
        context: TensorDict,
        backend: Hypergradient,
    ) -> None:
        """Raises if PyTorch is known, or seen, to differentiate the problem wrongly."""
        takes_second = not isinstance(backend, FirstDerivatives)
        if loop.has_tasks_axis:
            use = "second" if takes_second else "values" if isinstance(backend, BlackBox) else "first"
            refuse_wrong_vectorisation(self._kind, self._bound, task_slice, variables, context, use=use)
        # Nothing is remembered of a problem without steps: the same with another horizon has some.
        elif takes_second and loop.num_steps > 0:
            refuse_faulty_operations(self._kind, loop, variables)

    def _slice(self, task_slice: TaskSlice | None, backend: Hypergradient) -> tuple[Grads, _Part]:
        # Leaves of each slice, whose graphs go with it.
        leaves = tree.leaves_requiring_grad(self._hparams)
        with torch.enable_grad():
            context = self._bound.context(leaves, task_slice)
        loop = self._bound.loop(task_slice, context)
        # What the context only passes on, data say, is no variable.
        moving = {name for name, value in context.items() if value.requires_grad}
        # Cut from its graph, so that the backend differentiates in the context's entries, however it goes, and the
        # graph behind them is gone through once, below.
        cut = tree.leaves_requiring_grad({name: value for name, value in context.items() if name in moving})
        variables = {**leaves, **{name: cut[name] if name in moving else value for name, value in context.items()}}
        if loop.first_task == 0:  # whatever the tasks are, their losses run the same operations
            self._refuse_faults(loop, task_slice, variables, context, backend)
        result = backend.compute(loop, variables)
        missing = variables.keys() - result.grads.keys()
        if missing:
            raise ValueError(
                f"`{type(backend).__name__}.compute` returned grads without {sorted(missing)}: a variable that is left "
                "out could be one that was forgotten. Name every variable, with None where it follows no path."
            )
        # The chain rule through the context: df/dhparams = direct + (df/dcontext) (dcontext/dhparams).
        chained = vjp(list(context.values()), [result.grads[name] for name in context], leaves)
        grads = {name: tree.add_optional(result.grads[name], chained[name]) for name in leaves}
        return grads, _Part(
            outer_loss=result.outer_loss,
            params=result.state.params,
            carry={**loop.carry_after(result.state), **result.carry},
            figures=result.figures,
            cost=loop.record.cost,
            inner_losses=torch.stack([*loop.record.losses.values()]) if loop.record.losses else result.outer_loss,
            weight=_weight(task_slice),
        )

    def explain_non_finite(
        self, slices: list[TaskSlice | None], grads: TensorDict, figures: TensorDict
    ) -> NonFiniteError:
        """Returns the error that names where NaN or infinity first appeared, found by running forward again."""
        # A run that fails is run again to tell where; one that does not pays nothing for it.
        with self._bound.running(), torch.no_grad():
            constants = tree.detach(self._hparams)
            for item in slices:
                context = self._bound.context(constants, item)
                found = first_non_finite(self._bound.loop(item, context), {**constants, **context})
                if found is not None:
                    return found
        return non_finite_hypergradient(grads, figures)


def _weight(task_slice: TaskSlice | None) -> int:
    return 1 if task_slice is None else task_slice.stop - task_slice.start


def _total_weight(slices: list[TaskSlice | None]) -> int:
    return sum(_weight(item) for item in slices)


def _check_allow_unused(problem: BilevelProblem, hparams: TensorDict) -> None:
    unknown = sorted(set(problem.allow_unused) - hparams.keys())
    if unknown:
        raise ValueError(
            f"`allow_unused` names {unknown}, which are not among the hyperparameters {sorted(hparams)}: a misspelt "
            "name would allow nothing. Correct it or leave it out."
        )


def _check_arguments(problem: BilevelProblem, backend: Hypergradient) -> None:
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            f"`problem` is a {type(problem).__name__}, not a `BilevelProblem`: there is no inner loop to "
            "differentiate. Pass `source.at(outer_step)` if you have a `ProblemSource`."
        )
    if not isinstance(backend, Hypergradient):
        raise TypeError(
            f"`backend` is {backend!r}, not a `Hypergradient`: it is what computes the derivative. Pass an instance, "
            "for example `ht.hypergradients.Reverse()`."
        )
