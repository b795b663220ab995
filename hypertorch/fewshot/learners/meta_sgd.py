"""Meta-SGD: an initialisation and a step size for every weight are the outer variables."""

from __future__ import annotations

from torch import Tensor, nn

from hypertorch.dynamics import Dynamics
from hypertorch.fewshot.learners.network_learner import NetworkLearner
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.types import TensorDict


class MetaSGD(NetworkLearner):
    """All weights are adapted from a learnt initialisation, each with a learnt step size of its own.

    `w = theta - alpha * grad L(theta)` elementwise, with outer variables `theta` and `log alpha`. The logarithm keeps
    the step sizes positive; the paper lets them change sign.

    Cost: that of MAML, with twice as many outer variables.

    Args:
        network: from inputs to outputs; for classification it ends with `way` logits. It is copied.
        dynamics: the inner optimiser; its step size is where all step sizes start.
        num_steps: inner steps (unit: steps); 1 in the paper.
        objective: loss and figures of support and query; classification by default.

    Raises:
        ValueError: if the dynamics has no step size to learn, or the network has nothing to train.
        IncompatibleBackendError: if the network has a layer whose hypergradient PyTorch would get wrong.

    References:
        Li, Zhou, Chen and Li (2017), Meta-SGD: learning to learn quickly for few-shot learning, equation 2.
    """

    def __init__(
        self, network: nn.Module, *, dynamics: Dynamics, num_steps: int = 1, objective: Objective | None = None
    ) -> None:
        super().__init__(network, dynamics=dynamics, num_steps=num_steps, learn_lr="parameter", objective=objective)

    def inner_loss(self, loss: Tensor, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the loss of the support set."""
        return loss

    def outer_loss(self, loss: Tensor, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the loss of the query set."""
        return loss
