"""The front door: one function that validates, runs a backend over the tasks and returns the hypergradient."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.products import vjp
from hypertorch.errors import NonFiniteError
from hypertorch.hypergradients.base import BlackBox, Hypergradient, HypergradientResult, PathBlind
from hypertorch.hypergradients.guards.examination import examine
from hypertorch.hypergradients.guards.finiteness import first_non_finite, non_finite_hypergradient
from hypertorch.hypergradients.guards.reachability import check_reachability, known_reach, moved_by_values
from hypertorch.hypergradients.reverse import Reverse
from hypertorch.hypergradients.reverse_mode.sweep import Grads
from hypertorch.hypergradients.spread import carry_of_ranks, check_spread, sum_of_ranks
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
    slices = run.slices()
    found, outer_loss, parts = run.over(slices) if execution.ranks is None else run.over_ranks(slices)
    if isinstance(backend, PathBlind) or any(value is None for value in found.values()):
        check_reachability(backend, found, problem.allow_unused, lambda: run.reached(slices))
    grads = {name: torch.zeros_like(hparams[name]) if value is None else value for name, value in found.items()}
    figures = join_tasks([part.figures for part in parts], slices)
    # Checked once, at the end. A check at every inner step costs 7 % of a small step.
    if not tree.all_finite([*grads.values(), outer_loss, *(part.inner_losses for part in parts)]):
        raise run.explain_non_finite(slices, grads, figures)
    carry = join_tasks([part.carry for part in parts], slices)
    if execution.ranks is not None and problem.num_tasks is not None:
        carry = carry_of_ranks(execution.ranks, carry, problem.num_tasks)
    return HypergradientResult(
        grads=grads,
        outer_loss=outer_loss,
        params=join_tasks([part.params for part in parts], slices),
        stats=sum((part.cost for part in parts), Cost()),
        carry=carry,
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
    """The result for one slice of tasks, without its hypergradient and outer loss."""

    params: TensorDict
    carry: TensorDict
    figures: TensorDict
    cost: Cost
    inner_losses: Tensor


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
        self._hparams = hparams
        self._backend = backend
        self._outer_step = outer_step
        self._kind = kind_of(problem)

    def measured(self) -> Execution:
        """Returns the execution, its `tasks` measured if need be."""
        bound = self._bound
        run = self._over_uncompiled if getattr(self._backend, "compile", False) else self.over
        return measured(bound.execution, bound.problem, (repr(self._backend), self._kind), self._hparams, run)

    def slices(self) -> list[TaskSlice | None]:
        """Returns the slices of tasks in the order they are run; a single None for a problem without tasks."""
        num_tasks = self._bound.problem.num_tasks
        if num_tasks is None:
            return [None]
        execution = self.measured()
        return task_slices(num_tasks, execution) if execution.ranks is None else own_slices(num_tasks, execution)

    def over(self, slices: list[TaskSlice | None]) -> tuple[Grads, Tensor, list[_Part]]:
        """Returns the part of these slices in the mean of hypergradient and outer loss, and what else each slice gives.

        None stands for an entry that no task has a path from. The sum is taken in pairs, beside which one slice's
        hypergradient is held.
        """
        # First of all: a function that depends on more than its arguments has no right derivative, by any backend.
        examine(self._bound, self._hparams, slices[0], kind=self._kind, use=self._backend.takes)
        num_tasks = self._bound.problem.num_tasks
        # By weight: the last chunk may hold fewer tasks than the others.
        shares = [1.0 if item is None or num_tasks is None else (item.stop - item.start) / num_tasks for item in slices]
        with self._bound.running():
            if len(slices) == 1:
                grads, outer_loss, part = self._slice(slices[0], self._backend, shares[0])
                return grads, outer_loss, [part]
            total, losses, parts = tree.PairwiseSum(), tree.PairwiseSum(), list[_Part]()
            for item, share in zip(slices, shares, strict=True):
                grads, outer_loss, part = self._slice(item, self._backend, share)
                total.add(grads)
                losses.add({"": outer_loss})
                parts.append(part)
        outer_loss = losses.total()[""]
        assert outer_loss is not None
        return total.total(), outer_loss, parts

    def _over_uncompiled(self, slices: list[TaskSlice | None]) -> tuple[Grads, Tensor, list[_Part]]:
        """Returns what `over` does, without a compiler: to measure both ways to run tasks would compile both."""
        run = copy(self)
        run._backend = replace(self._backend, compile=False)  # type: ignore[call-arg]
        return run.over(slices)

    def over_ranks(self, slices: list[TaskSlice | None]) -> tuple[Grads, Tensor, list[_Part]]:
        """Returns what `over` does, with hypergradient and outer loss those of all processes.

        Raises:
            HypertorchError: as `hypergradient` does, on every process what any of them meets.
        """
        problem, ranks = self._bound.problem, self._bound.execution.ranks
        assert ranks is not None
        check_spread(problem, self._backend, self._hparams, ranks)
        parts: list[_Part] = []

        def own() -> tuple[Grads, Tensor]:
            found, outer_loss, own_parts = self.over(slices)
            grads = {name: value for name, value in found.items() if value is not None}
            # Before the sum: after it, nothing tells whose inner loop it was.
            if not tree.all_finite([*grads.values(), outer_loss, *(part.inner_losses for part in own_parts)]):
                raise self.explain_non_finite(slices, grads, join_tasks([part.figures for part in own_parts], slices))
            parts.extend(own_parts)
            return found, outer_loss

        has_tasks = problem.num_tasks is not None
        found, outer_loss = sum_of_ranks(ranks, own, self._hparams, self._outer_step, has_tasks=has_tasks)
        return found, outer_loss, parts

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
        examine(self._bound, self._hparams, slices[0], kind=self._kind, use="second")
        reached: set[str] = set()
        with self._bound.running():
            for item in slices:
                # What one task shows for all hyperparameters, the others need not.
                if reached == self._hparams.keys():
                    break
                # In little memory: the user may have chosen a backend that fits where a whole graph does not.
                grads, _, _ = self._slice(item, Reverse(checkpoint_every="sqrt"), 1.0)
                reached |= {name for name, value in grads.items() if value is not None}
        return frozenset(reached)

    def _slice(self, task_slice: TaskSlice | None, backend: Hypergradient, share: float) -> tuple[Grads, Tensor, _Part]:
        """Returns a slice's hypergradient and outer loss times its share of all tasks, and what else it gives."""
        # New leaves for each slice, so that its graph is freed with it.
        leaves = tree.leaves_requiring_grad(self._hparams)
        with torch.enable_grad():
            context = self._bound.context(leaves, task_slice)
        loop = self._bound.loop(task_slice, context)
        # Cut from its graph, so that any backend differentiates in the context's entries, and the graph behind them is
        # traversed once, below. Entries that the context only passes on, such as data, are no variables.
        cut = {name: value.detach().requires_grad_(value.requires_grad) for name, value in context.items()}
        variables = {**leaves, **cut}
        result = backend.compute(loop, variables)
        missing = variables.keys() - result.grads.keys()
        if missing:
            raise ValueError(
                f"`{type(backend).__name__}.compute` returned grads without {sorted(missing)}: a variable that is left "
                "out could be one that was forgotten. Name every variable, with None where it follows no path."
            )
        # The chain rule through the context: df/dhparams = direct + (df/dcontext) (dcontext/dhparams).
        chained = vjp([*context.values()], [result.grads[name] for name in context], leaves) if context else {}
        grads: Grads = {}
        for name in leaves:
            grad = tree.add_optional(result.grads[name], chained.get(name))
            # A single slice is not multiplied by one, which would copy it.
            grads[name] = grad if grad is None or share == 1.0 else grad * share
        outer_loss = result.outer_loss if share == 1.0 else result.outer_loss * share
        part = _Part(
            params=result.state.params,
            carry={**loop.carry_after(result.state), **result.carry},
            figures=result.figures,
            cost=loop.record.cost,
            inner_losses=torch.stack([*loop.record.losses.values()]) if loop.record.losses else result.outer_loss,
        )
        return grads, outer_loss, part

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
