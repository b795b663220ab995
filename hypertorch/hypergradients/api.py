"""The front door: one function that validates, runs a backend over the tasks and returns the hypergradient."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.products import vjp
from hypertorch.errors import NonFiniteError
from hypertorch.hypergradients.base import BlackBox, Hypergradient, HypergradientResult, PathBlind
from hypertorch.hypergradients.guards.examination import examine
from hypertorch.hypergradients.guards.finiteness import first_non_finite, non_finite_hypergradient
from hypertorch.hypergradients.guards.reachability import check_reachability, known_reach, moved_by_values
from hypertorch.hypergradients.ranks.spread import carry_of_ranks, check_spread, sum_of_ranks
from hypertorch.hypergradients.reverse import Reverse
from hypertorch.hypergradients.reverse_mode.sweep import Grads
from hypertorch.inner.bound_problem import BoundProblem, join_tasks
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.inner.kinds import kind_of
from hypertorch.inner.record import Cost
from hypertorch.inner.tasks import TaskSlice, measured, own_slices, task_slices
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
    derivative is then incomplete), looks like any other: `check_hypergradient` finds it.

    Cost: that of the backend, for each slice of tasks in turn, plus one evaluation and one vjp of the context. The
    first problem of a kind (the same classes, functions, and modules in the same modes) is looked at for side effects
    before: its first step and its outer loss are evaluated twice, and must agree, and some derivatives are taken. That
    costs about ten evaluations of the losses on one task, and is not counted in `stats`.

    With `ranks` in the execution, every process calls it with the same arguments and gets the same `grads`,
    `outer_loss` and `carry`, those of all tasks; `params`, `figures` and `stats` are of its own share of the work. One
    collective more, and memory for as many hypergradients as there are processes.

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
    slices: list[TaskSlice | None] = [None] if problem.num_tasks is None else run.slices(problem.num_tasks)
    if execution.ranks is not None:
        found = run.over_ranks(slices)
    elif len(slices) == 1 and (slices[0] is None or slices[0].whole):
        found = run.over(slices[0])
    else:
        found = run.over_all(slices)
    in_doubt, grads = isinstance(backend, PathBlind), dict[str, Tensor]()
    for name, value in found.grads.items():
        in_doubt |= value is None
        grads[name] = torch.zeros_like(hparams[name]) if value is None else value
    if in_doubt:
        check_reachability(backend, found.grads, problem.allow_unused, lambda: run.reached(slices))
    # Checked once, at the end. A check at every inner step costs 7 % of a small step.
    if not tree.all_finite([*grads.values(), found.outer_loss, *found.inner_losses]):
        raise run.explain_non_finite(slices, grads, found.figures)
    return HypergradientResult(
        grads=grads,
        outer_loss=found.outer_loss,
        params=found.params,
        stats=found.cost,
        carry=found.carry,
        figures=found.figures,
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
class _Found:
    """What was found for some tasks: their part of the hypergradient and of the outer loss, and what else they give.

    None stands for an entry that none of them has a path from.
    """

    grads: Grads
    outer_loss: Tensor
    params: TensorDict
    carry: TensorDict
    figures: TensorDict
    cost: Cost
    inner_losses: list[Tensor]


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
        if not isinstance(problem, BilevelProblem) or not isinstance(backend, Hypergradient):
            raise _wrong_argument(problem, backend)
        self._bound = BoundProblem(problem, hparams, outer_step, carry, execution)
        self._hparams = hparams
        self._backend = backend
        self._outer_step = outer_step
        self._kind = kind_of(problem)
        self._examines = True

    def measured(self) -> Execution:
        """Returns the execution, its `tasks` measured if need be."""
        bound, backend = self._bound, self._backend
        # To measure both ways to run tasks would compile both.
        run = self._by(replace(backend, compile=False) if getattr(backend, "compile", False) else backend)  # type: ignore[call-arg]
        run._examines = False
        key = (repr(backend), self._kind)
        look = partial(examine, bound, self._hparams, kind=self._kind, use=backend.takes)
        return measured(bound.execution, bound.problem, key, self._hparams, look, run.over_all)

    def slices(self, num_tasks: int) -> list[TaskSlice | None]:
        """Returns the slices of the tasks in the order they are run."""
        execution = self._bound.execution
        if execution.tasks == "auto":
            execution = self.measured()
        return task_slices(num_tasks, execution) if execution.ranks is None else own_slices(num_tasks, execution)

    def over(self, item: TaskSlice | None) -> _Found:
        """Returns what is found for one slice of tasks, in the form that it is run in; None for a problem without."""
        bound, backend = self._bound, self._backend
        # First of all: a function that depends on more than its arguments has no right derivative, by any backend.
        if self._examines:
            examine(bound, self._hparams, item, kind=self._kind, use=backend.takes)
        with bound.running():
            # New leaves for each slice, so that its graph is freed with it.
            leaves = tree.leaves_requiring_grad(self._hparams)
            context, variables = dict[str, Tensor](), leaves
            if bound.problem.context is not None:
                with torch.enable_grad():
                    context = bound.context(leaves, item)
                # Cut from its graph, so that any backend differentiates in the context's entries, and the graph behind
                # them is traversed once, below. Entries that it only passes on, such as data, are no variables.
                cut = {name: value.detach().requires_grad_(value.requires_grad) for name, value in context.items()}
                variables = {**leaves, **cut}
            loop = bound.loop(item, context)
            result = backend.compute(loop, variables)
            missing = variables.keys() - result.grads.keys()
            if missing:
                raise ValueError(
                    f"`{type(backend).__name__}.compute` returned grads without {sorted(missing)}: a variable that is "
                    "left out could be one that was forgotten. Name every variable, with None where it follows no path."
                )
            grads = {name: result.grads[name] for name in leaves}
            if context:
                # The chain rule through the context: df/dhparams = direct + (df/dcontext) (dcontext/dhparams).
                chained = vjp([*context.values()], [result.grads[name] for name in context], leaves)
                grads = tree.accumulate(grads, chained)
        losses = loop.record.losses
        return _Found(
            grads=grads,
            outer_loss=result.outer_loss,
            params=result.state.params,
            carry={**loop.carry_after(result.state), **result.carry},
            figures=result.figures,
            cost=loop.record.cost,
            inner_losses=[torch.stack([*losses.values()])] if losses else [],
        )

    def over_all(self, slices: list[TaskSlice | None]) -> _Found:
        """Returns what is found for some slices of tasks: their part in the mean of all, and the rest joined.

        The sum is taken in pairs, beside which one slice's hypergradient is held.
        """
        num_tasks = self._bound.problem.num_tasks
        total, losses, parts = tree.PairwiseSum(), tree.PairwiseSum(), list[_Found]()
        for item in slices:
            part = self.over(item)
            # By weight: the last chunk may hold fewer tasks than the others.
            share = 1.0 if item is None or num_tasks is None else (item.stop - item.start) / num_tasks
            if share != 1.0:  # a product with one would be a copy
                part = replace(
                    part,
                    grads={name: None if grad is None else grad * share for name, grad in part.grads.items()},
                    outer_loss=part.outer_loss * share,
                )
            total.add(part.grads)
            losses.add({"": part.outer_loss})
            # The sum has them: a slice's own are held no longer.
            parts.append(replace(part, grads={}))
            del part
        outer_loss = losses.total()[""]
        assert outer_loss is not None
        return _Found(
            grads=total.total(),
            outer_loss=outer_loss,
            params=join_tasks([part.params for part in parts], slices),
            carry=join_tasks([part.carry for part in parts], slices),
            figures=join_tasks([part.figures for part in parts], slices),
            cost=sum((part.cost for part in parts), Cost()),
            inner_losses=[losses for part in parts for losses in part.inner_losses],
        )

    def over_ranks(self, slices: list[TaskSlice | None]) -> _Found:
        """Returns what is found for the tasks of this process, with hypergradient, outer loss and carry those of all.

        Raises:
            HypertorchError: as `hypergradient` does, on every process what any of them meets.
        """
        problem, ranks = self._bound.problem, self._bound.execution.ranks
        assert ranks is not None
        check_spread(problem, self._backend, self._hparams, ranks)
        own: list[_Found] = []

        def compute() -> tuple[Grads, Tensor]:
            found = self.over_all(slices)
            grads = {name: value for name, value in found.grads.items() if value is not None}
            # Before the sum: after it, nothing tells whose inner loop it was.
            if not tree.all_finite([*grads.values(), found.outer_loss, *found.inner_losses]):
                raise self.explain_non_finite(slices, grads, found.figures)
            own.append(found)
            return found.grads, found.outer_loss

        has_tasks = problem.num_tasks is not None
        grads, outer_loss = sum_of_ranks(ranks, compute, self._hparams, self._outer_step, has_tasks=has_tasks)
        carry = own[0].carry
        if problem.num_tasks is not None:
            carry = carry_of_ranks(ranks, carry, problem.num_tasks)
        return replace(own[0], grads=grads, outer_loss=outer_loss, carry=carry)

    def reached(self, slices: list[TaskSlice | None]) -> frozenset[str]:
        """Returns the names of the hyperparameters that reach the outer loss."""
        problem, execution = self._bound.problem, self._bound.execution
        if execution.ranks is not None:
            # All tasks, so that every process comes to the same answer.
            slices = task_slices(problem.num_tasks, replace(self.measured(), ranks=None))
        if isinstance(self._backend, BlackBox):
            return known_reach(
                problem, "values", self._hparams, lambda: moved_by_values(self._bound, self._hparams, slices)
            )
        return known_reach(problem, "autograd", self._hparams, lambda: self._reached_by_autograd(slices))

    def _reached_by_autograd(self, slices: list[TaskSlice | None]) -> frozenset[str]:
        # In little memory: the user may have chosen a backend that fits where a whole graph does not.
        run, reached = self._by(Reverse(checkpoint_every="sqrt")), set[str]()
        for item in slices:
            # What one task shows for all hyperparameters, the others need not.
            if reached == self._hparams.keys():
                break
            reached |= {name for name, value in run.over(item).grads.items() if value is not None}
        return frozenset(reached)

    def _by(self, backend: Hypergradient) -> _Run:
        """Returns the same call with another backend."""
        run = copy(self)
        run._backend = backend
        return run

    def explain_non_finite(
        self, slices: list[TaskSlice | None], grads: TensorDict, figures: TensorDict
    ) -> NonFiniteError:
        """Returns the error that names where NaN or infinity first appeared, found by running forward again."""
        # Only a run that fails is run again, to find the step: all others pay nothing.
        with self._bound.running(), torch.no_grad():
            constants = tree.detach(self._hparams)
            for item in slices:
                context = self._bound.context(constants, item)
                found = first_non_finite(self._bound.loop(item, context), {**constants, **context})
                if found is not None:
                    return found
        return non_finite_hypergradient(grads, figures)


def _wrong_argument(problem: object, backend: object) -> TypeError:
    if not isinstance(problem, BilevelProblem):
        return TypeError(
            f"`problem` is a {type(problem).__name__}, not a `BilevelProblem`: there is no inner loop to "
            "differentiate. Pass `source.at(outer_step)` if you have a `ProblemSource`."
        )
    return TypeError(
        f"`backend` is {backend!r}, not a `Hypergradient`: it is what computes the derivative. Pass an instance, "
        "for example `ht.hypergradients.Reverse()`."
    )
