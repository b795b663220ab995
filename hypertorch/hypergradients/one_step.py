"""Differentiation through the last inner step only, exactly or by finite differences of first derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.autodiff.products import vjp
from hypertorch.checks.argument_types import check_fields
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.reverse_mode.graph import graph_vjp
from hypertorch.hypergradients.reverse_mode.prefix import run_prefix
from hypertorch.hypergradients.reverse_mode.sweep import Grads, Segment, pull_back, sweep
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class OneStep(Hypergradient):
    """The hypergradient through the last inner step, the state before it held constant (T1-T2).

        df/dhparams ~ dE/dhparams + dE/ds_T dPhi_T/dhparams   at constant s_{T-1}

    For gradient descent the second term is `- lr dE/dw d2L/(dw dhparams)`: the implicit hypergradient with the identity
    in place of the inverse Hessian, times the step size. It equals `Truncated(window=1)`, except for a run of one
    step, whose initialisation is constant here too: a hyperparameter that acts on the initialisation alone is
    refused at any `num_steps`.

    With `finite_difference`, the second derivative is replaced by two first ones (as in DARTS). With `g = dL/dw` the
    gradient of the last step and `c = dE/dg` the cotangent that reaches it through the update rule,

        c d2L/(dw dhparams) ~ (dL/dhparams(w + e c) - dL/dhparams(w - e c)) / 2e,   e = epsilon / |c|

    with a norm for each task, and an error of order `epsilon^2`. The rule's own derivative in the hyperparameters (of
    a learnt step size, say) is exact. Both losses see the last step's data and noise; running statistics are
    constants.

    Cost: `num_steps` steps and one vjp; with `finite_difference` two more evaluations of the inner loss and its
    derivative in the hyperparameters, counted as steps. Memory: the graph of one step, without a second derivative
    with `finite_difference`.

    Args:
        finite_difference: use two first derivatives in place of the second one.
        epsilon: distance that the params are moved by (unit: of the params, above 0).

    Raises:
        ValueError: if `epsilon` is not above 0.
        IncompatibleBackendError: (from `compute`) if there is no step; with `finite_difference`, if the dynamics
            evaluate the gradient more than once in a step, or elsewhere than at the params.

    References:
        Luketina, Berglund, Greff and Raiko (2016), Scalable gradient-based tuning of continuous regularization
        hyperparameters, section 3; Liu, Simonyan and Yang (2019), DARTS, equations 7 and 8.
    """

    finite_difference: bool = False
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self, "finite_difference", "epsilon")
        if not 0.0 < self.epsilon < math.inf:
            raise ValueError(
                f"`epsilon` is {self.epsilon!r}: a difference needs two places. Pass a finite number above 0; "
                "0.01 is usual."
            )

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the derivative of the outer loss in `variables` through the last step, direct term included."""
        if loop.num_steps == 0:
            raise IncompatibleBackendError(
                "`OneStep` got a problem with `num_steps` = 0: there is no last step to differentiate. Use "
                "`Reverse()`, which differentiates through `init_params`."
            )
        step = loop.num_steps - 1
        # No graph before the last step: the params that it starts from are constants.
        prefix = run_prefix(loop, variables, step)
        segment = Segment(step, step + 1, prefix.state)
        if self.finite_difference:
            return prefix.add_to(_finite_difference(loop, variables, segment, self.epsilon))
        return prefix.add_to(sweep(loop, variables, [segment], partial(graph_vjp, loop, variables)))


def _finite_difference(loop: InnerLoop, variables: TensorDict, segment: Segment, epsilon: float) -> BackendResult:
    start, step = segment.departure, segment.start
    with torch.enable_grad():
        # The gradient enters as leaves: one vjp gives the part that does not pass through it, and its cotangent.
        state, loss = loop.transition(start, variables, step, route="leaf")
        loop.record.add_step(step, loss.value)
        term = loop.term(state, variables, step)
        outer_loss = loop.outer(state.params, variables)
        outer_loss = outer_loss if term is None else outer_loss + term
    loop.record.add_vjps(1, graph_steps=1)

    gradient = _gradient_leaves(loop, loss, loop.trained(start.params))
    # What does not pass through the gradient, and the cotangent of the gradient.
    grads, cotangents = pull_back([outer_loss], [torch.ones_like(outer_loss)], InnerState(gradient, {}), variables)
    cotangent = {name: value for name, value in zip(gradient, cotangents, strict=True) if value is not None}
    if cotangent:
        grads = tree.accumulate(grads, _mixed_derivative(loop, variables, segment, cotangent, epsilon))
    return BackendResult(grads=grads, outer_loss=outer_loss.detach(), state=state.detached())


def _gradient_leaves(loop: InnerLoop, loss: InnerLoss, params: TensorDict) -> TensorDict:
    """Returns the gradient that the step was taken with, as leaves of its graph; empty if it took none."""
    # A leaf hides that the place of a later gradient depends on an earlier one.
    if len(loss.evaluations) > 1:
        raise IncompatibleBackendError(
            f"`OneStep(finite_difference=True)` got dynamics {loop.dynamics!r}, which evaluate the gradient "
            f"{len(loss.evaluations)} times in a step: the later ones depend on hyperparameters through the earlier "
            "ones, which takes a second derivative. Use `OneStep()`."
        )
    if not loss.evaluations:
        return {}
    point, gradient = loss.evaluations[0]
    # A diverged run is not what is looked for here: NaN equals NaN.
    if tree.not_zero(
        {name: ~torch.isclose(point[name], params[name], rtol=0.0, atol=0.0, equal_nan=True) for name in point}
    ):
        raise IncompatibleBackendError(
            f"`OneStep(finite_difference=True)` got dynamics {loop.dynamics!r}, which evaluate the gradient elsewhere "
            "than at the params: the place may depend on hyperparameters, which takes a second derivative. Use "
            "`OneStep()`."
        )
    return gradient


def _mixed_derivative(
    loop: InnerLoop, variables: TensorDict, segment: Segment, cotangent: TensorDict, epsilon: float
) -> Grads:
    """Returns `c d2L/(dw dhparams)` by a central difference of `dL/dhparams` along the cotangent `c`."""
    params = loop.trained(segment.departure.params)
    # One for each task: a task with a large cotangent would take the digits of the others.
    length = tree.norm(cotangent, tasks_axis=loop.has_tasks_axis)
    # Where no cotangent arrives, the difference has no weight; the bound only prevents 0 / 0.
    distance = epsilon / length.clamp(min=torch.finfo(length.dtype).tiny)

    def loss_at(distance: Tensor) -> Tensor:
        moved = tree.add({name: params[name] for name in cotangent}, cotangent, alpha=distance)
        # Bound anew for each: the noise is seeded again, and so the same.
        loss = loop.loss_at(segment.departure, segment.start)
        loop.record.add_step(None)
        return loss({**params, **moved}, variables)

    with torch.enable_grad():
        ahead, behind = loss_at(distance), loss_at(-distance)
    # [dL/dh(w + d c) - dL/dh(w - d c)] / (2 d) with d = epsilon / |c|: equation 8 of DARTS.
    weight = (length / (2.0 * epsilon)).to(ahead.dtype)
    # Both in one pass, which sums the difference up: two gradients and no second derivative.
    return vjp([ahead, behind], [weight, -weight], variables)
