"""An inner run in integers, forward and undone step by step: its states are computed back, not kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.dynamics.reversible import ExactState, ReversibleDynamics
from hypertorch.dynamics.reversible.base import GradientFunction
from hypertorch.dynamics.reversible.exact_arithmetic import LARGEST_NUMBER, encode
from hypertorch.errors import NonFiniteError, ReplayError
from hypertorch.hypergradients.guards.finiteness import first_non_finite
from hypertorch.hypergradients.reverse_mode.compiled.single_steps import CompiledSteps, try_dynamics
from hypertorch.hypergradients.reverse_mode.graph import graph_vjp, pulled_back
from hypertorch.hypergradients.reverse_mode.segments import initialisation
from hypertorch.hypergradients.reverse_mode.sweep import Differentiable, Segment
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


class ExactReversal:
    """One inner run in integers: `segments` undoes its steps from the last to the first, `vjp` differentiates them.

    Steps are taken, undone and differentiated on the blocks of the exact state: params that the rule treats alike are
    one tensor. The outer loss and the initial state are on the params of the problem.

    Attributes:
        differentiates_blocks: whether `vjp` does so too; else it takes and returns the params of the problem.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        rule: the rule that the loop steps by.
    """

    differentiates_blocks: ClassVar[bool] = True

    def __init__(self, loop: InnerLoop, variables: TensorDict, rule: ReversibleDynamics) -> None:
        self.loop = loop
        self.variables = variables
        self.rule = rule
        self.information_bits = torch.zeros(())
        self._exact: ExactState  # while the run goes forward and back
        self._point: TensorDict = {}  # where the last gradient was taken: the params before that step
        self._graph: tuple[TensorDict, TensorDict] = {}, {}  # the same as leaves, and that gradient
        self._losses: list[Tensor] = []  # in the order of the run, which ends where it began

    def segments(self) -> Iterator[Segment]:
        """Yields single steps, from the last to the first, and the initial state that they must lead to.

        Around steps on blocks, a segment of no steps leads from the blocks to the problem's params, and one from
        these to the blocks.

        Raises:
            NonFiniteError: if params, velocities or gradients leave the range of the integers.
            ReplayError: if the run backwards does not end at the initial state.
        """
        loop, num_steps = self.loop, self.loop.num_steps
        exact = scan(self._advance, self._start(), range(num_steps))
        if exact.out_of_range():
            raise self._explain_range()
        self.information_bits = exact.information_bits(loop.has_tasks_axis)
        # The state before a step and the one after it, whatever the horizon is.
        loop.record.hold(2)
        # Read before a step is undone, which changes the integers in place.
        after = self._floats(exact.float_params())
        if self.differentiates_blocks:
            yield Segment(num_steps, num_steps, after)
        for step in reversed(range(num_steps)):
            self.rule.unstep(exact, self._gradient(step), self.variables, loop.first_index + step)
            before = self._floats(self._point)
            # The sweep differentiates a segment before it asks for the next: the kept graph is that of this step.
            yield Segment(step, step + 1, before, after)
            after = before
        first = initialisation(loop, self.variables, None)
        self._check_arrival(exact, first.departure)
        if self.differentiates_blocks:
            yield Segment(0, 0, first.departure.detached())
        yield first

    def vjp(self, segment: Segment) -> Differentiable:
        """Returns the step that was undone last, differentiated through the gradient that undid it."""
        # The initial state, which was not stepped to: it has its own graph.
        if segment.connected:
            return graph_vjp(self.loop, self.variables, segment)
        return self._regrouped(segment) if segment.start == segment.stop else self._step_vjp(segment)

    def _step_vjp(self, segment: Segment) -> Differentiable:
        loop, variables, step = self.loop, self.variables, segment.start
        params, grads = self._graph
        leaves = InnerState(params, tree.leaves_requiring_grad(segment.departure.dynamics))
        with torch.enable_grad():
            # The rule once more, in floats: its gradient is there already,
            # with its graph, and is not taken a second time.
            end = InnerState(*self.rule.update(grads, params, leaves.dynamics, variables, loop.first_index + step))
            term = loop.term(self._entries(end), variables, step) if loop.has_terms else None
        loop.record.add_vjps(1, graph_steps=1)

        assert segment.arrival is not None
        return Differentiable(segment.arrival, partial(pulled_back, end, term, leaves, variables))

    def _regrouped(self, segment: Segment) -> Differentiable:
        """Returns a segment of no steps: from blocks to the problem's params after the last step, else to blocks."""
        leaves = self.loop.leaves(segment.departure)
        with torch.enable_grad():
            end = self._entries(leaves) if segment.start else self._blocks(leaves)
        return Differentiable(end, partial(pulled_back, end, None, leaves, self.variables))

    def _floats(self, params: TensorDict) -> InnerState:
        """Returns the state that the integers stand for, given its params, as `vjp` takes it."""
        blocks = InnerState(params, self._exact.float_buffers())
        return blocks if self.differentiates_blocks else self._entries(blocks)

    def _entries(self, blocks: InnerState) -> InnerState:
        """Returns the params and buffers of the problem that blocks hold."""
        joint_params, joint_buffers = self._exact.joint_params, self._exact.joint_buffers
        return InnerState(joint_params.split(blocks.params), joint_buffers.split(blocks.dynamics))

    def _blocks(self, entries: InnerState) -> InnerState:
        """Returns the blocks of the problem's params and buffers."""
        joint_params, joint_buffers = self._exact.joint_params, self._exact.joint_buffers
        return InnerState(joint_params.join(entries.params), joint_buffers.join(entries.dynamics))

    def _gradient(self, step: int) -> GradientFunction:
        """Returns the gradient of a step's loss, whose graph is kept until the next one is computed.

        Some kernels differ in the last bit with and without a graph, so forward and back must do the same.
        """
        joint = self._exact.joint_params

        def gradient(blocks: TensorDict) -> TensorDict:
            self._point, leaves = blocks, tree.leaves_requiring_grad(blocks)
            with torch.enable_grad():
                params = joint.split(leaves)
                loss = self.loop.loss_at(InnerState(params, {}), step, separate_params=True)
                grads = joint.join(loss.gradient(params, self.variables))
            self.loop.record.add_step(step, loss.value)
            self._note_loss(step)
            self._graph = leaves, grads
            return tree.detach(grads)

        return gradient

    def _note_loss(self, step: int) -> None:
        self._losses.append(self.loop.record.losses[step])

    def _start(self, *, side_by_side: bool = True) -> ExactState:
        loop = self.loop
        # With its graph, as at the end of the way back: some kernels differ in the last bit with and without one.
        initial = initialisation(loop, self.variables, None).departure.detached()
        indices = range(loop.first_index, loop.first_index + loop.num_steps)
        batch_dims = int(loop.has_tasks_axis) if side_by_side else None
        self._exact = self.rule.start_exact(
            initial.params, initial.dynamics, self.variables, indices, batch_dims=batch_dims
        )
        return self._exact

    def _advance(self, exact: ExactState, step: int) -> ExactState:
        """Takes a step, in place."""
        self.rule.step_exact(exact, self._gradient(step), self.variables, self.loop.first_index + step)
        return exact

    def _check_arrival(self, exact: ExactState, initial: InnerState) -> None:
        """Raises `ReplayError` unless the run backwards ended where the run forward began, with nothing left over."""
        # In integers, where equal means equal: no tolerance hides a step that was undone wrongly.
        gaps = {
            name: value != encode(first)
            for name, value, first in zip(initial.names(), exact.integers(), initial.tensors(), strict=True)
        }
        left = {f"information of {name}": buffer.left() for name, buffer in exact.information.items()}
        # One look for all: each waits for the device.
        moved = tree.not_zero({**gaps, **left})
        if not moved:
            return
        missed = [name for name in gaps if name in moved]
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
        forward, backward = self._losses[:num_steps], self._losses[: num_steps - 1 : -1]
        for step in reversed(range(num_steps)):
            if not torch.equal(forward[step], backward[step]):
                return f"Going back, inner step {step} is the first whose loss was not the same."
        return (
            "Every loss was the same, so a gradient (of a kernel that is not deterministic) or `init_params` was not."
        )

    def _explain_range(self) -> NonFiniteError:
        """Returns the error that names where a number left the range, found by running forward once more."""
        where, found = "", {}

        def look(exact: ExactState, step: int) -> None:
            nonlocal where, found
            if not found:
                where = f"at inner step {step - 1}" if step else "before the first inner step"
                found = exact.out_of_range()

        num_steps = self.loop.num_steps
        look(scan(self._advance, self._start(side_by_side=False), range(num_steps), look), num_steps)
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


class CompiledReversal(ExactReversal):
    """The same run with compiled derivatives; a gradient is the same program forward and back, so it has the same bits.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        rule: the rule that the loop steps by.
    """

    # The compiled vjp is that of any dynamics, and calls params as the problem does.
    differentiates_blocks: ClassVar[bool] = False

    def __init__(self, loop: InnerLoop, variables: TensorDict, rule: ReversibleDynamics) -> None:
        super().__init__(loop, variables, rule)
        # Before any program is compiled: what is wrong with the problem is said in its own words.
        try_dynamics(loop, variables)
        self._steps = CompiledSteps(loop, variables, mixed=False)

    def vjp(self, segment: Segment) -> Differentiable:
        """Returns the step that was undone last, whose vjp is compiled."""
        found = self._steps.vjp(segment)
        # The same step in floats ends elsewhere by the noise of the integers. That steps are undone is seen at the end.
        return found if segment.arrival is None else found._replace(end=segment.arrival)

    def _gradient(self, step: int) -> GradientFunction:
        joint = self._exact.joint_params

        def gradient(blocks: TensorDict) -> TensorDict:
            self._point = blocks
            grads = joint.join(self._steps.gradient(joint.split(blocks), step))
            self._note_loss(step)
            return grads

        return gradient
