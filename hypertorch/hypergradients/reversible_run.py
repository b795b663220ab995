"""An inner run on integers, forward and back."""

from __future__ import annotations

import math

import torch

from hypertorch import tree
from hypertorch.derivatives import vjp
from hypertorch.dynamics.reversible import ExactState, ReversibleDynamics
from hypertorch.errors import NonFiniteError, ReplayError
from hypertorch.exact_arithmetic import LARGEST_NUMBER, encode
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.finiteness import first_non_finite
from hypertorch.hypergradients.pull_back import Cotangents, PulledBack, accumulate, last_term, pull_back
from hypertorch.inner_loop import InnerLoop
from hypertorch.inner_state import InnerState
from hypertorch.types import TensorDict


class ReversibleRun:
    """One inner run on integers, forward and back.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        rule: the rule that the loop steps by.
    """

    def __init__(self, loop: InnerLoop, variables: TensorDict, rule: ReversibleDynamics) -> None:
        self.loop = loop
        self.variables = variables
        self.rule = rule

    def result(self) -> BackendResult:
        """Returns the hypergradient of the whole run."""
        loop, variables = self.loop, self.variables
        exact = self._forward()
        last = InnerState(exact.float_params(), exact.float_buffers())
        figures = {"information_bits": exact.information_bits(loop.has_tasks_axis)}
        loop.cost.stored_states = 2
        loop.cost.graph_steps = 1

        grads, cotangents, outer_loss = last_term(loop, variables, last)
        for step in reversed(range(loop.num_steps)):
            part, cotangents, step_loss = self.back(exact, cotangents, step)
            grads = accumulate(grads, part)
            outer_loss = outer_loss + step_loss

        initial = self._initial()
        self._check_arrival(exact, initial)
        grads = accumulate(grads, vjp(initial.tensors(), cotangents, variables))
        return BackendResult(grads=grads, outer_loss=outer_loss, state=last, figures=figures)

    def _initial(self) -> InnerState:
        with torch.enable_grad():
            return self.loop.initial(self.variables)

    def _start(self, *, side_by_side: bool = True) -> ExactState:
        loop = self.loop
        initial = self._initial().detached()
        indices = range(loop.first_index, loop.first_index + loop.num_steps)
        batch_dims = int(loop.has_tasks_axis) if side_by_side else None
        return self.rule.start_exact(initial.params, initial.dynamics, self.variables, indices, batch_dims=batch_dims)

    def _forward(self) -> ExactState:
        """Returns the state after all steps."""
        exact = self._start()
        for step in range(self.loop.num_steps):
            self.advance(exact, step)
        if exact.out_of_range():
            raise self._explain_range()
        return exact

    def advance(self, exact: ExactState, step: int) -> None:
        """Takes a step, in place."""
        self.rule.step_exact(
            exact,
            lambda params: tree.detach(self._gradient(tree.leaves_requiring_grad(params), step)),
            self.variables,
            self.loop.first_index + step,
        )

    def _gradient(self, leaves: TensorDict, step: int) -> TensorDict:
        """Returns the gradient of a step's loss with its graph, whether that is needed or not.

        Some kernels differ in the last bit with and without a graph, so forward and back must do the same.
        """
        with torch.enable_grad():
            loss = self.loop.bound_loss(InnerState(leaves, {}), step)
            gradient = loss.gradient(leaves, self.variables)
        self.loop.count_step(loss)
        return gradient

    def back(self, exact: ExactState, cotangents: Cotangents, step: int) -> PulledBack:
        """Undoes a step and pulls the cotangents through it; its gradient is computed once for both."""
        loop, variables = self.loop, self.variables
        graph: list[tuple[TensorDict, TensorDict]] = []

        def gradient(params: TensorDict) -> TensorDict:
            leaves = tree.leaves_requiring_grad(params)
            graph.append((leaves, self._gradient(leaves, step)))
            return tree.detach(graph[0][1])

        self.rule.unstep(exact, gradient, variables, loop.first_index + step)
        params, grads = graph.pop()
        leaves = InnerState(params, tree.leaves_requiring_grad(exact.float_buffers()))
        with torch.enable_grad():
            arrived = InnerState(*self.rule.update(grads, params, leaves.dynamics, variables, loop.first_index + step))
            step_loss = torch.zeros((), device=loop.device)
            if loop.has_step_loss:
                step_loss = step_loss + loop.step_loss(arrived.params, variables, step)
        loop.cost.vjps += 1
        outputs = [*arrived.tensors(), step_loss]
        part, before = pull_back(outputs, [*cotangents, torch.ones_like(step_loss)], leaves, variables)
        return PulledBack(part, before, step_loss.detach())

    def _check_arrival(self, exact: ExactState, initial: InnerState) -> None:
        """Raises `ReplayError` unless the run backwards ended where the run forward began, with nothing left over."""
        expected = [encode(value) for value in initial.tensors()]
        missed = [
            name
            for name, value, first in zip(initial.names(), exact.integers(), expected, strict=True)
            if not torch.equal(value, first)
        ]
        if not missed and all(buffer.is_empty() for buffer in exact.information.values()):
            return
        what = f"`{missed[0]}` came back with other bits" if missed else "information was left over"
        raise ReplayError(
            f"the inner run went backwards and did not end at its initial state: {what}. The derivative would belong "
            f"to another run. {self._first_difference()} Let `InnerProblem.batch`, `loss` and `init_params` depend on "
            "their arguments only (no iterator, no counter, no generator of your own), call "
            "`torch.use_deterministic_algorithms(True)`, or use `Reverse()`, which runs every step once."
        )

    def _first_difference(self) -> str:
        """Returns where the replayed losses, which ran last to first, left those of the forward run."""
        num_steps = self.loop.num_steps
        forward = self.loop.inner_losses[-2 * num_steps : -num_steps]
        backward = self.loop.inner_losses[-num_steps:][::-1]
        for step in reversed(range(num_steps)):
            if not torch.equal(forward[step], backward[step]):
                return f"Going back, inner step {step} is the first whose loss was not the same."
        return (
            "Every loss was the same, so a gradient (of a kernel that is not deterministic) or `init_params` was not."
        )

    def _explain_range(self) -> NonFiniteError:
        """Returns the error that names where a number left the range, found by running forward once more."""
        exact = self._start(side_by_side=False)
        where, found = "before the first inner step", exact.out_of_range()
        for step in range(self.loop.num_steps):
            if found:
                break
            self.advance(exact, step)
            where, found = f"at inner step {step}", exact.out_of_range()
        if not found:
            return NonFiniteError(
                f"params or velocities reached {LARGEST_NUMBER:g}, but not when the run was repeated: the inner loss "
                "is not a function of its arguments. Let `InnerProblem.batch` and `loss` depend on them only."
            )
        name, value = next(iter(found.items()))
        if not math.isfinite(value):
            with torch.no_grad():
                named = first_non_finite(self.loop, tree.detach(self.variables))
            if named is not None:
                return named
        reached = f"reached {value:.3g}" if math.isfinite(value) else "holds NaN or infinity"
        return NonFiniteError(
            f"`{name}` (or its velocity, gradient or update) {reached} {where}: the integers that "
            f"`Reversible` computes with hold numbers below {LARGEST_NUMBER:g}. Lower the inner step size, or the "
            "scale of the loss; `Reverse(checkpoint_every='sqrt')` has no such range."
        )
