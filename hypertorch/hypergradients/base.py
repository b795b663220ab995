"""What a hypergradient backend is, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from hypertorch.inner_loop import Cost, InnerLoop, InnerState
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class BackendResult:
    """What a backend computed for one inner loop.

    Attributes:
        grads: the derivative of the outer loss in each variable; None where there is no path to it.
        outer_loss: scalar, the mean over the loop's tasks.
        state: the last inner state.
    """

    grads: dict[str, Tensor | None]
    outer_loss: Tensor
    state: InnerState


class Hypergradient(ABC):
    """A way to compute the hypergradient; leaves are frozen dataclasses of settings and hold no state."""

    @abstractmethod
    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the derivative of the outer loss at the end of `loop` in `variables`, direct term included.

        Args:
            loop: the inner loop as pure functions of `(state, variables)`. Its costs are counted on it.
            variables: hyperparameters and context, as leaves that require grad where they can.

        Raises:
            IncompatibleBackendError: if this backend cannot serve this problem.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class HypergradientResult:
    """The hypergradient at one outer step, as values without a graph.

    Attributes:
        grads: df/dhparams, named and shaped like `hparams`.
        outer_loss: f, a scalar: the mean over tasks.
        params: the last params, with a leading tasks axis if the problem has tasks.
        stats: steps, vjps and stored states, counted; for one slice of tasks at a time.
        carry: what must survive to the next outer step; empty unless the problem is warm-started.
    """

    grads: TensorDict
    outer_loss: Tensor
    params: TensorDict
    stats: Cost
    carry: TensorDict = field(default_factory=dict)
