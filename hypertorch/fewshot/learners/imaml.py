"""Implicit MAML: the inner solution is tied to the shared weights, and differentiated without unrolling."""

from __future__ import annotations

import math

from torch import Tensor, nn

from hypertorch.dynamics import Dynamics
from hypertorch.fewshot.learners.network_learner import NetworkLearner
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.types import TensorDict


class IMAML(NetworkLearner):
    """All weights are adapted near the shared weights, to which a proximal term ties them.

    The inner loss is `L(w) + proximity / 2 |w - theta|^2`. At its minimum the hypergradient needs no unrolling, only
    the solution of `(I + H / proximity) g = dE/dw`, which the backend `Implicit` finds by conjugate gradients; its
    memory does not grow with the inner steps. Other backends differentiate the same inner loop by unrolling.

    Cost: per episode, `num_steps` steps on the support set, and one Hessian-vector product per iteration of the solve.

    Args:
        network: from inputs to outputs; for classification it ends with `way` logits. It is copied.
        dynamics: the inner optimiser.
        num_steps: inner steps (unit: steps); enough to come near the minimum.
        proximity: strength of the proximal term, above 0 (the paper's lambda).
        objective: loss and figures of support and query; classification by default.

    Raises:
        ValueError: if `proximity` is not above 0, or the network has nothing to train.
        IncompatibleBackendError: if the network has a layer whose hypergradient PyTorch would get wrong.

    References:
        Rajeswaran, Finn, Kakade and Levine (2019), Meta-learning with implicit gradients, equations 3 and 6.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        dynamics: Dynamics,
        num_steps: int,
        proximity: float = 2.0,
        objective: Objective | None = None,
    ) -> None:
        if not 0.0 < proximity < math.inf:
            raise ValueError(
                f"`proximity` is {proximity}: without a proximal term the solution forgets the shared weights. Pass a "
                "number above 0; 2 is the paper's."
            )
        super().__init__(network, dynamics=dynamics, num_steps=num_steps, learn_lr=None, objective=objective)
        self._proximity = proximity

    def inner_loss(self, loss: Tensor, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the loss of the support set and the proximal term."""
        distance = sum((value - hparams[name]).square().sum() for name, value in params.items())
        return loss + 0.5 * self._proximity * distance

    def outer_loss(self, loss: Tensor, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the loss of the query set."""
        return loss
