"""The steps of an inner loop, forward without a graph, and differentiated one segment at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hypertorch import tree
from hypertorch.hypergradients.reverse_mode.graph import graph_vjp
from hypertorch.hypergradients.reverse_mode.mixed import mixed_vjp
from hypertorch.hypergradients.reverse_mode.sweep import Differentiable, Segment
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


class Steps(ABC):
    """How the steps of one inner loop are run."""

    @abstractmethod
    def initial(self) -> InnerState:
        """Returns the state before the first step, without a graph."""

    @abstractmethod
    def advance(self, state: InnerState, step: int) -> InnerState:
        """Returns the state after a step, without a graph."""

    @abstractmethod
    def vjp(self, segment: Segment) -> Differentiable:
        """Runs a segment so that it can be differentiated."""

    def check_replays(self) -> None:
        """Raises `ReplayError` if a step gave another result when it was run again, and `vjp` has not noticed."""
        return


class EagerSteps(Steps):
    """Steps without compilation.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        mixed: whether single steps are differentiated in mixed mode. Those of problems with buffers are not: the new
            values of buffers have a path past the gradient.
    """

    def __init__(self, loop: InnerLoop, variables: TensorDict, *, mixed: bool) -> None:
        self._loop = loop
        self._variables = variables
        # Once, and not in every step of a forward run.
        self._constants = tree.detach(variables)
        self._mixed = mixed and not loop.has_buffers

    def initial(self) -> InnerState:
        """Returns the state before the first step."""
        with torch.no_grad():
            return self._loop.initial(self._constants)

    def advance(self, state: InnerState, step: int) -> InnerState:
        """Returns the state after a step."""
        with torch.no_grad():
            return self._loop.advance(state, self._constants, step)

    def vjp(self, segment: Segment) -> Differentiable:
        """Runs a segment with its graph, in mixed mode without that of the inner gradient."""
        # The initial state may have a graph, which mixed mode would cut: it goes by its graph.
        by = mixed_vjp if self._mixed and not segment.connected else graph_vjp
        return by(self._loop, self._variables, segment)
