"""One inner step in reverse mode, with the derivative of the inner gradient taken by forward over reverse."""

from __future__ import annotations

import torch
from torch import Tensor

from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.autodiff.products import vjp
from hypertorch.hypergradients.reverse_mode.graph import with_terms
from hypertorch.hypergradients.reverse_mode.sweep import Cotangents, Differentiable, PulledBack, Segment, pull_back
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict


def mixed_vjp(loop: InnerLoop, variables: TensorDict, segment: Segment) -> Differentiable:
    """Runs a single step so that it can be differentiated without a graph of the inner gradient.

    The step is `s' = u(g, s, h)` with `g = grad_w L(w, h)`. First the update alone is differentiated, which gives the
    gradient's cotangent; then the gradient, along it:

        a = a' du/dg,   (a_w, a_h) += d<g, a>/d(w, h) = d/de grad_{w,h} L(w + e a, h)

    A rule that takes several gradients in a step is differentiated from the last one to the first.

    Cost: the step with its gradient, and two to three gradients more for each; memory of one gradient's graph with
    its tangents, and no graph of a backward pass.

    Args:
        loop: the inner loop; one without buffers, whose new values have a path past the gradient.
        variables: hyperparameters and context, as leaves.
        segment: the step.

    The part of a variable that the inner loss reads is never None: forward mode answers zeros where there is no path.

    Raises:
        RuntimeError: (PyTorch's own) if an operation of the inner loss has no forward derivative.

    References:
        Kemaev et al. (2025), Scalable meta-learning via mixed-mode differentiation, section 3 (MixFlow-MG).
    """
    step = segment.start
    leaves = loop.leaves(segment.departure)
    with torch.enable_grad():
        end, loss = loop.transition(leaves, variables, step, route="leaf")
        loop.record.add_step(step, loss.value)
        term = loop.term(end, variables, step)
    loop.record.add_vjps(1, graph_steps=1)

    def pull_back_step(cotangents: Cotangents) -> PulledBack:
        outputs, seeds = with_terms(end, cotangents, term)
        outputs, seeds, _ = through_gradients(loss, outputs, seeds)
        grads, before = pull_back(outputs, seeds, leaves, variables)
        return PulledBack(grads, before, None if term is None else term.detach())

    return Differentiable(end, pull_back_step)


def through_gradients(
    loss: InnerLoss, outputs: list[Tensor], seeds: Cotangents
) -> tuple[list[Tensor], Cotangents, Tensor | None]:
    """Returns outputs and cotangents to which the paths through the inner gradients are added, as paths through points.

    And the loss at the first evaluation, as the mixed derivative there has it.

    The gradients must be leaves of the outputs' graph. What goes on from a gradient goes on from the params and hparams
    that it was evaluated at, which become outputs themselves.

    Args:
        loss: of a step that was run by the route "leaf".
        outputs: of the step.
        seeds: their cotangents.
    """
    value = loss.value
    for call in reversed(loss.calls):
        # a = a' du/dg. The graph of the update is gone through again in the end, for the state and the variables.
        reached = vjp(outputs, seeds, call.gradient, retain_graph=True)
        direction = {name: value for name, value in reached.items() if value is not None}
        if direction:
            # (a_w, a_h) = d<g, a>/d(w, h)
            in_params, in_hparams, value = loss.mixed_derivative(call, direction)
            # The point itself may be computed, as by a rule that looks
            # ahead: its cotangent goes on through its graph.
            points = [*(call.params[name] for name in in_params), *(call.hparams[name] for name in in_hparams)]
            outputs, seeds = [*outputs, *points], [*seeds, *in_params.values(), *in_hparams.values()]
    return outputs, seeds, value
