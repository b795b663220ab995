"""Reverse-mode differentiation that runs the inner loop backwards instead of storing it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hypertorch import tree
from hypertorch.derivatives import vjp
from hypertorch.dynamics.reversible import ExactState, ReversibleDynamics, reversible_rule
from hypertorch.errors import IncompatibleBackendError, NonFiniteError, ReplayError
from hypertorch.exact_arithmetic import LARGEST_NUMBER, encode
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.finiteness import first_non_finite
from hypertorch.hypergradients.pull_back import Cotangents, PulledBack, accumulate, last_term, pull_back
from hypertorch.hypergradients.window import differentiate_window, whole_window
from hypertorch.inner_loop import InnerLoop, InnerState
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class Reversible(Hypergradient):
    """The exact hypergradient by reverse mode, the trajectory not stored but run backwards, bit for bit.

    The inner loop runs on integers. Going back from its last state, with the same gradient at every step:

        s_{t-1} = Phi_t^{-1}(s_t);   grads += a_t dPhi_t/dhparams;   a_{t-1} = a_t dPhi_t/ds_{t-1}

    What a step forgets is kept: `log2(1/momentum)` bits per weight, so with momentum 0.9 the memory of a run is 200
    times smaller than its trajectory in 32-bit numbers, and 1,000 times with 0.98. At the end the initial state must
    come back bit for bit, which proves that no derivative was taken elsewhere.

    It serves dynamics whose steps can be undone, such as `ReversibleMomentum`, with minibatches, noise, tasks, terms
    at inner steps and warm starts; not running statistics, whose steps cannot. Params and velocities must stay below
    1024 in magnitude. The gradient must be the same to the last bit whenever it is computed: on a GPU, see
    `torch.use_deterministic_algorithms`.

    `information_bits` in the result's `figures` is what was kept per weight at the end of the forward run, the mean
    (unit: bits).

    Cost: `2 num_steps` steps, both times with their graph, and `num_steps` vjps. Memory: two states, one step's graph,
    and 64 bits per weight for the head of the information, which takes 32 more whenever it is full: whatever
    `num_steps` is, but for `num_steps log2(1/momentum)` bits per weight.

    Raises:
        IncompatibleBackendError: (from `compute`) if the dynamics are not reversible, or the inner problem has
            untrained buffers.
        NonFiniteError: (from `compute`) if params, velocities or gradients leave the range of the integers.
        ReplayError: (from `compute`) if the run backwards does not end at the initial state.

    References:
        Maclaurin, Duvenaud and Adams (2015), Gradient-based hyperparameter optimization through reversible learning,
        algorithms 2 and 3.
    """

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the exact derivative of the outer loss in `variables`."""
        if loop.num_steps == 0:
            return differentiate_window(loop, variables, whole_window(loop, variables))
        return _ReversibleRun(loop, variables, _checked_rule(loop)).result()


def _checked_rule(loop: InnerLoop) -> ReversibleDynamics:
    """Returns the rule that the loop steps by, or raises if its steps cannot be undone."""
    rule = reversible_rule(loop.dynamics)
    if rule is None:
        raise IncompatibleBackendError(
            f"`Reversible()` got a problem with the dynamics `{type(loop.dynamics).__name__}`, whose steps cannot be "
            "undone bit for bit. Use `ht.dynamics.ReversibleMomentum(lr=..., momentum=...)`, or the backend "
            "`Reverse(checkpoint_every='sqrt')` for little memory with any dynamics."
        )
    if loop.has_buffers:
        raise IncompatibleBackendError(
            "`Reversible()` got an inner problem with untrained buffers (running statistics): a step overwrites them, "
            "and nothing keeps what they were. Let the norm layers use the statistics of the batch "
            "(`track_running_stats=False`), or use the backend `Reverse(checkpoint_every='sqrt')`."
        )
    return rule


class _ReversibleRun:
    """One inner run on integers, forward and back.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        rule: the rule that the loop steps by.
    """

    def __init__(self, loop: InnerLoop, variables: TensorDict, rule: ReversibleDynamics) -> None:
        self._loop = loop
        self._variables = variables
        self._rule = rule

    def result(self) -> BackendResult:
        """Returns the hypergradient of the whole run."""
        loop, variables = self._loop, self._variables
        exact = self._forward()
        last = InnerState(exact.float_params(), exact.float_buffers())
        figures = {"information_bits": exact.information_bits(loop.has_tasks_axis)}
        loop.cost.stored_states = 2
        loop.cost.graph_steps = 1

        grads, cotangents, outer_loss = last_term(loop, variables, last)
        for step in reversed(range(loop.num_steps)):
            part, cotangents, step_loss = self._back(exact, cotangents, step)
            grads = accumulate(grads, part)
            outer_loss = outer_loss + step_loss

        initial = self._initial()
        self._check_arrival(exact, initial)
        grads = accumulate(grads, vjp(initial.tensors(), cotangents, variables))
        return BackendResult(grads=grads, outer_loss=outer_loss, state=last, figures=figures)

    def _initial(self) -> InnerState:
        with torch.enable_grad():
            return self._loop.initial(self._variables)

    def _start(self, *, side_by_side: bool = True) -> ExactState:
        loop = self._loop
        initial = self._initial().detached()
        indices = range(loop.first_index, loop.first_index + loop.num_steps)
        batch_dims = int(loop.has_tasks_axis) if side_by_side else None
        return self._rule.start_exact(initial.params, initial.dynamics, self._variables, indices, batch_dims=batch_dims)

    def _forward(self) -> ExactState:
        """Returns the state after all steps."""
        exact = self._start()
        for step in range(self._loop.num_steps):
            self._advance(exact, step)
        if exact.out_of_range():
            raise self._explain_range()
        return exact

    def _advance(self, exact: ExactState, step: int) -> None:
        self._rule.step_exact(
            exact,
            lambda params: tree.detach(self._gradient(tree.leaves_requiring_grad(params), step)),
            self._variables,
            self._loop.first_index + step,
        )

    def _gradient(self, leaves: TensorDict, step: int) -> TensorDict:
        """Returns the gradient of a step's loss with its graph, whether that is needed or not.

        Some kernels differ in the last bit with and without a graph, so forward and back must do the same.
        """
        with torch.enable_grad():
            loss = self._loop.bound_loss(InnerState(leaves, {}), step)
            gradient = loss.gradient(leaves, self._variables)
        self._loop.count_step(loss)
        return gradient

    def _back(self, exact: ExactState, cotangents: Cotangents, step: int) -> PulledBack:
        """Undoes a step and pulls the cotangents through it; its gradient is computed once for both."""
        loop, variables = self._loop, self._variables
        graph: list[tuple[TensorDict, TensorDict]] = []

        def gradient(params: TensorDict) -> TensorDict:
            leaves = tree.leaves_requiring_grad(params)
            graph.append((leaves, self._gradient(leaves, step)))
            return tree.detach(graph[0][1])

        self._rule.unstep(exact, gradient, variables, loop.first_index + step)
        params, grads = graph.pop()
        leaves = InnerState(params, tree.leaves_requiring_grad(exact.float_buffers()))
        with torch.enable_grad():
            arrived = InnerState(*self._rule.update(grads, params, leaves.dynamics, variables, loop.first_index + step))
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
        num_steps = self._loop.num_steps
        forward = self._loop.inner_losses[-2 * num_steps : -num_steps]
        backward = self._loop.inner_losses[-num_steps:][::-1]
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
        for step in range(self._loop.num_steps):
            if found:
                break
            self._advance(exact, step)
            where, found = f"at inner step {step}", exact.out_of_range()
        if not found:
            return NonFiniteError(
                f"params or velocities reached {LARGEST_NUMBER:g}, but not when the run was repeated: the inner loss "
                "is not a function of its arguments. Let `InnerProblem.batch` and `loss` depend on them only."
            )
        name, value = next(iter(found.items()))
        if not math.isfinite(value):
            with torch.no_grad():
                named = first_non_finite(self._loop, tree.detach(self._variables))
            if named is not None:
                return named
        reached = f"reached {value:.3g}" if math.isfinite(value) else "holds NaN or infinity"
        return NonFiniteError(
            f"`{name}` (or its velocity, gradient or update) {reached} {where}: the integers that "
            f"`Reversible` computes with hold numbers below {LARGEST_NUMBER:g}. Lower the inner step size, or the "
            "scale of the loss; `Reverse(checkpoint_every='sqrt')` has no such range."
        )
