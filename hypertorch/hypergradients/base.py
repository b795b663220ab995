"""What a hypergradient backend is, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.record import Cost
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict, TensorMapping


# No equality: that of its fields would compare tensors, entry by entry.
@dataclass(frozen=True, kw_only=True, eq=False)
class BackendResult:
    """What a backend computed for one inner loop.

    Attributes:
        grads: the derivative of the outer loss in each variable; None where there is no path to it.
        outer_loss: scalar, the mean over the loop's tasks.
        state: the last inner state.
        figures: the backend's estimates of its own accuracy, each of shape `()` or `(tasks,)`.
        carry: what the backend itself must keep for the next outer step. Names that begin with `shared.` have no
            tasks axis; `params.`, `dynamics.` and `index` belong to the inner state.
    """

    grads: dict[str, Tensor | None]
    outer_loss: Tensor
    state: InnerState
    figures: TensorDict = field(default_factory=dict)
    carry: TensorDict = field(default_factory=dict)


class Hypergradient(ABC):
    """A way to compute the hypergradient; leaves are frozen dataclasses of settings and hold no state.

    In the grads of `compute`, None says that the backend follows no path from a variable to the outer loss: there is
    none, or the backend drops it; the front door finds out which. A backend that cannot tell is a `PathBlind`.

    Attributes:
        takes: what the backend takes of the inner loss beside its gradient: values, first derivatives, or second ones
            too. What PyTorch gets wrong beyond that does not concern it.
    """

    takes: ClassVar[Literal["values", "first", "second"]] = "second"

    def num_parts(self, hparams: TensorMapping) -> int:
        """Returns into how many parts, each for a process of its own, the work on one inner problem can be divided.

        1 unless overridden. A backend that overrides it computes the parts `loop.share(...)`, and the grads that it
        returns on the processes add up to the hypergradient.
        """
        return 1

    @abstractmethod
    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the derivative of the outer loss at the end of `loop` in `variables`, direct term included.

        Args:
            loop: the inner loop as pure functions of `(state, variables)`. Its costs are counted on it.
            variables: hyperparameters and context, as leaves that require grad where they can.

        Raises:
            IncompatibleBackendError: if this backend cannot serve this problem.
        """


class PathBlind(Hypergradient):
    """A marker: the backend returns zeros, not None, where a variable does not reach the outer loss (forward mode).

    Where such a zero appears, the front door asks reverse mode, once for each problem, whether there is a path.
    """


class RandomDirections(PathBlind):
    """A marker: the backend returns noise where a variable does not reach the outer loss.

    The front door asks reverse mode, once for each problem, which variables do.
    """


class BlackBox(PathBlind):
    """A marker: the backend sees values only, and returns noise where a variable does not change them.

    The front door moves every variable, once for each problem, to see which ones do.
    """

    takes = "values"


@dataclass(frozen=True, kw_only=True, eq=False)
class HypergradientResult:
    """The hypergradient at one outer step, as values without a graph.

    Attributes:
        grads: df/dhparams, named and shaped like `hparams`.
        outer_loss: f, a scalar: the mean over tasks.
        params: the last params, with a leading tasks axis if the problem has tasks.
        stats: steps, vjps and stored states, counted; for one slice of tasks at a time.
        carry: what must survive to the next outer step; empty unless the problem is warm-started.
        figures: the backend's estimates of its own accuracy (such as the residual of a linear solve), each of shape
            `()` or `(tasks,)`; most backends have none.
    """

    grads: TensorDict
    outer_loss: Tensor
    params: TensorDict
    stats: Cost
    carry: TensorDict = field(default_factory=dict)
    figures: TensorDict = field(default_factory=dict)
