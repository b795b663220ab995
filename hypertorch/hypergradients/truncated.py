"""Reverse-mode differentiation through the last inner steps only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hypertorch.checks.values import is_count
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.reverse_mode.graph import graph_vjp, whole_graph
from hypertorch.hypergradients.reverse_mode.prefix import run_prefix
from hypertorch.hypergradients.reverse_mode.sweep import Segment, sweep
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class Truncated(Hypergradient):
    """The hypergradient by reverse mode through the last `window` inner steps (K-RMD); it is biased.

    With `T = num_steps`, `K = window` and `s_{T-K}` held constant:

        df/dhparams ~ dE/dhparams + sum_{t=T-K+1..T} a_t dPhi_t/dhparams,   a_T = dE/ds_T, a_{t-1} = a_t dPhi_t/ds_{t-1}

    On a contraction the bias decays geometrically in `window`, at the contraction's rate. A window of `num_steps` or
    more is the whole run, the initialisation included: the number of `Reverse()`.

    Under a shorter window some paths are dropped: a hyperparameter that acts on the initialisation alone is refused;
    the entries of a learnt schedule at steps before the window get exact zeros. A term of the outer loss at a step
    inside the window is differentiated through the window; an earlier one gives its direct derivative in the
    hyperparameters only.

    Cost: `num_steps` steps and `window` vjps. Memory: the graphs of `window` steps, whatever `num_steps` is.

    Args:
        window: trailing steps that are differentiated (unit: steps, at least 1).

    Raises:
        ValueError: if `window` is below 1.

    References:
        Shaban, Cheng, Hatch and Boots (2019), Truncated back-propagation for bilevel optimization, section 3.
    """

    window: int

    def __post_init__(self) -> None:
        if not is_count(self.window):
            raise ValueError(
                f"`window` is {self.window!r}: without a step in it nothing that happens in the inner loop has a "
                "derivative. Pass a whole number of steps, at least 1."
            )

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the derivative of the outer loss in `variables` through the window, direct term included."""
        first = loop.num_steps - self.window
        if first <= 0:
            return sweep(loop, variables, *whole_graph(loop, variables))
        prefix = run_prefix(loop, variables, first)
        # Not connected: the state before the window is a constant, which is where the bias comes from.
        window = Segment(first, loop.num_steps, prefix.state)
        return prefix.add_to(sweep(loop, variables, [window], partial(graph_vjp, loop, variables)))
