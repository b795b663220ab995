"""A segment of the inner loop run with a graph of all its steps, and differentiated through it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.inner_loss import GradientRoute
from hypertorch.hypergradients.reverse_mode.sweep import (
    Cotangents,
    Differentiable,
    PulledBack,
    Segment,
    SegmentVjp,
    pull_back,
)
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


class _Run(NamedTuple):
    """An inner state, and the sum of the terms of the outer loss up to it; None for none."""

    state: InnerState
    terms: Tensor | None


def whole_graph(
    loop: InnerLoop, variables: TensorDict, route: GradientRoute = "differentiable"
) -> tuple[list[Segment], SegmentVjp]:
    """Returns what `sweep` goes back by where one graph holds all steps: a single segment, and its vjp.

    Cost: one evaluation of the initial state. In the sweep, `num_steps` steps and as many vjps; memory of all their
    graphs.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        route: how the gradient of the inner loss enters the derivative.
    """
    with torch.enable_grad():
        # Connected: the initial state's part arrives in the variables by the same vjp.
        run = Segment(0, loop.num_steps, loop.initial(variables), connected=True)
    return [run], partial(graph_vjp, loop, variables, route=route)


def graph_vjp(
    loop: InnerLoop, variables: TensorDict, segment: Segment, route: GradientRoute = "differentiable"
) -> Differentiable:
    """Runs the steps of a segment with a graph, through which the cotangents of their end are pulled back.

    Cost: the steps and as many vjps; memory of their graphs.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        segment: the segment.
        route: how the gradient of the inner loss enters the derivative.
    """
    # Only the first segment is connected. Any other starts from leaves, where its cotangents are read off.
    leaves = segment.departure if segment.connected else loop.leaves(segment.departure)
    start, stop = segment.start, segment.stop

    def advance(run: _Run, step: int) -> _Run:
        # `loop.step` written out: every operation of a step then lies one call less deep.
        state, loss = loop.transition(run.state, variables, step, route)
        loop.record.add_step(step, loss.value, loss.tracked_buffers)
        term = loop.term(state, variables, step)
        return _Run(state, run.terms if term is None else tree.add_optional(run.terms, term))

    with torch.enable_grad():
        run = scan(advance, _Run(leaves, None), range(start, stop))
    buffers = loop.problem.inner.buffers
    if buffers:
        loop.record.track(name for name in buffers if run.state.params[name].requires_grad)
    loop.record.add_vjps(stop - start, graph_steps=stop - start)
    if segment.connected:
        # A departure with a graph is no leaf: its part arrives in the variables.
        leaves = InnerState({}, {})
    return Differentiable(run.state, partial(pulled_back, run.state, run.terms, leaves, variables))


def pulled_back(
    end: InnerState, terms: Tensor | None, leaves: InnerState, variables: TensorDict, cotangents: Cotangents
) -> PulledBack:
    """Returns what a segment adds, by the graph of its end.

    Args:
        end: the state after the segment.
        terms: the sum of the terms of the outer loss in it; None for none.
        leaves: the state before the segment, as leaves.
        variables: hyperparameters and context, as leaves.
        cotangents: of the end.
    """
    grads, before = pull_back(*with_terms(end, cotangents, terms), leaves, variables)
    return PulledBack(grads, before, None if terms is None else terms.detach())


def with_terms(end: InnerState, cotangents: Cotangents, terms: Tensor | None) -> tuple[list[Tensor], Cotangents]:
    """Returns the outputs of a segment with their cotangents, the terms of the outer loss among them."""
    if terms is None:
        return end.tensors(), list(cotangents)
    # A term counts with weight 1: as one more output it joins the state's cotangents in one vjp.
    return [*end.tensors(), terms], [*cotangents, torch.ones_like(terms)]
