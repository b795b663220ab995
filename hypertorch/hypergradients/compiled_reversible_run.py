"""An inner run on integers, forward and back, whose derivatives are compiled functions."""

from __future__ import annotations

from hypertorch.dynamics.reversible import ExactState, ReversibleDynamics
from hypertorch.hypergradients.compiled_steps import CompiledSteps, try_dynamics
from hypertorch.hypergradients.pull_back import Cotangents, PulledBack
from hypertorch.hypergradients.reversible_run import ReversibleRun
from hypertorch.inner_loop import InnerLoop
from hypertorch.inner_state import InnerState
from hypertorch.types import TensorDict


class CompiledReversibleRun(ReversibleRun):
    """The same run; a gradient is the same program forward and back, so that it has the same bits.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        rule: the rule that the loop steps by.
    """

    def __init__(self, loop: InnerLoop, variables: TensorDict, rule: ReversibleDynamics) -> None:
        super().__init__(loop, variables, rule)
        try_dynamics(loop, variables)
        self._steps = CompiledSteps(loop, variables, mixed=False)

    def advance(self, exact: ExactState, step: int) -> None:
        """Takes a step, in place."""
        self.rule.step_exact(
            exact,
            lambda params: self._steps.gradient(params, step, first_run=True),
            self.variables,
            self.loop.first_index + step,
        )

    def back(self, exact: ExactState, cotangents: Cotangents, step: int) -> PulledBack:
        """Undoes a step and pulls the cotangents through it."""
        arrival = InnerState(exact.float_params(), exact.float_buffers())
        self.rule.unstep(
            exact,
            lambda params: self._steps.gradient(params, step, first_run=False),
            self.variables,
            self.loop.first_index + step,
        )
        departure = InnerState(exact.float_params(), exact.float_buffers())
        return self._steps.pull_back(departure, cotangents, step, arrival)
