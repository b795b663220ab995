"""The steps before the first one that is differentiated: run without a graph, and held constant."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.products import vjp
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.reverse_mode.sweep import Grads
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


class Prefix(NamedTuple):
    """A run up to a step.

    Attributes:
        state: the inner state before that step, a constant.
        outer_loss: the sum of the terms of the outer loss so far, a scalar; None for none.
        grads: their direct derivative in each variable; None where there is none.
    """

    state: InnerState
    outer_loss: Tensor | None
    grads: Grads

    def add_to(self, result: BackendResult) -> BackendResult:
        """Returns the result of the steps after it, with the terms of the outer loss before them."""
        if self.outer_loss is None:
            return result
        return replace(
            result, outer_loss=result.outer_loss + self.outer_loss, grads=tree.accumulate(result.grads, self.grads)
        )


def run_prefix(loop: InnerLoop, variables: TensorDict, stop: int) -> Prefix:
    """Returns the run of steps `0 .. stop - 1` without a graph.

    Terms of the outer loss at these steps give their direct derivative `dE_t/dvariables` at constant params.

    Cost: `stop` steps; memory of one state.
    """
    constants = tree.detach(variables)

    def advance(run: Prefix, step: int) -> Prefix:
        with torch.no_grad():
            state = loop.advance(run.state, constants, step)
        with torch.enable_grad():
            term = loop.term(state, variables, step)
        if term is None:
            return run._replace(state=state)
        # At constant params only the direct part remains. It is taken at once, so that no graph outlives its step.
        direct = vjp([term], [torch.ones_like(term)], variables)
        return Prefix(state, tree.add_optional(run.outer_loss, term.detach()), tree.accumulate(run.grads, direct))

    with torch.no_grad():
        initial = loop.initial(constants)
    run = scan(advance, Prefix(initial, None, dict.fromkeys(variables)), range(stop))
    # A tensor of the user's that asks for its gradient does so under `no_grad`, too.
    return run._replace(state=run.state.detached())
