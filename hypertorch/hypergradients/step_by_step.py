"""Reverse mode one step at a time: a step and its vjp as two functions, run over the pieces of an inner loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TypeAlias

import torch

from hypertorch import tree
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.mixed_mode import pull_back_step_mixed
from hypertorch.hypergradients.pull_back import (
    Cotangents,
    PulledBack,
    accumulate,
    last_term,
    pull_back_initial,
    pull_back_steps,
)
from hypertorch.inner_loop import InnerLoop
from hypertorch.inner_state import InnerState
from hypertorch.types import TensorDict

Piece: TypeAlias = tuple[int, int, InnerState]
"""Consecutive steps: the first, one past the last, and the state before them."""


class Steps(ABC):
    """The steps of one inner loop, forward and backward, one at a time."""

    @abstractmethod
    def initial(self) -> InnerState:
        """Returns the state before the first step, without a graph."""

    @abstractmethod
    def advance(self, state: InnerState, step: int, *, first_run: bool = True) -> InnerState:
        """Returns the state after a step, without a graph.

        Args:
            state: the state before it.
            step: the step.
            first_run: whether the step was not run before, so that its loss is news.
        """

    @abstractmethod
    def pull_back(self, departure: InnerState, cotangents: Cotangents, step: int, arrival: InnerState) -> PulledBack:
        """Returns what a step adds to the hypergradient, given the cotangents of its end.

        Args:
            departure: the state before the step.
            cotangents: of the state after it.
            step: the step.
            arrival: the state after it as it was run first, to compare with.
        """

    @abstractmethod
    def check_replays(self) -> None:
        """Raises `ReplayError` if a step run again was another one and nothing was said yet."""


class EagerSteps(Steps):
    """Steps without compilation.

    Args:
        loop: the loop.
        variables: hyperparameters and context, as leaves.
        mixed: whether the derivative of the inner gradient is taken by forward over reverse. Problems with buffers go
            by reverse over reverse all the same: the new values of buffers have a path past the gradient.
    """

    def __init__(self, loop: InnerLoop, variables: TensorDict, *, mixed: bool) -> None:
        self._loop = loop
        self._variables = variables
        self._constants = tree.detach(variables)
        self._mixed = mixed and not loop.has_buffers

    def initial(self) -> InnerState:
        """Returns the state before the first step."""
        with torch.no_grad():
            return self._loop.initial(self._constants)

    def advance(self, state: InnerState, step: int, *, first_run: bool = True) -> InnerState:
        """Returns the state after a step."""
        loop = self._loop
        with torch.no_grad():
            if first_run:
                return loop.step(state, self._constants, step)
            end = loop.apply(loop.bound_loss(state, step), state, self._constants, step)
        loop.count_value(None)  # its loss is known
        return end

    def pull_back(self, departure: InnerState, cotangents: Cotangents, step: int, arrival: InnerState) -> PulledBack:
        """Returns what a step adds to the hypergradient, with a graph of that step alone."""
        if self._mixed:
            return pull_back_step_mixed(self._loop, self._variables, departure, cotangents, step, arrival)
        return pull_back_steps(self._loop, self._variables, departure, cotangents, step, step + 1, arrival=arrival)

    def check_replays(self) -> None:
        """Does nothing: each step was compared when it was run again."""


def go_back_step_by_step(
    loop: InnerLoop, variables: TensorDict, pieces: Iterator[Piece], steps: Steps
) -> BackendResult:
    """Goes back through the pieces of a run, from the last to the first, with one step's graph at a time.

    The states inside a piece are kept while it is gone through.

    Cost: the steps that `pieces` takes, the steps inside the pieces, and a step and a vjp for each.
    """
    last: InnerState | None = None
    for start, stop, departure in pieces:
        states = [departure]
        for step in range(start, stop if last is None else stop - 1):
            states.append(steps.advance(states[-1], step, first_run=last is None))
        if last is None:
            last = arrival = states.pop()
            # Where the pieces come from, the state before this one and the last one are counted.
            loop.cost.stored_states += stop - start - 1
            grads, cotangents, outer_loss = last_term(loop, variables, last)
        for step in reversed(range(start, stop)):
            part, cotangents, term = steps.pull_back(states[-1], cotangents, step, arrival)
            grads, outer_loss = accumulate(grads, part), outer_loss + term
            arrival = states.pop()
    assert last is not None
    steps.check_replays()
    grads = accumulate(grads, pull_back_initial(loop, variables, cotangents))
    return BackendResult(grads=grads, outer_loss=outer_loss, state=last)
