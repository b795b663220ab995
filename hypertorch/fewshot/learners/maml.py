"""Model-agnostic meta-learning: the initialisation of the inner loop is the outer variable."""

from __future__ import annotations

from torch import Tensor, nn

from hypertorch.dynamics import Dynamics
from hypertorch.fewshot.learners.network_learner import NetworkLearner
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.fewshot.learners.step_sizes import LearnLR
from hypertorch.types import TensorDict


class MAML(NetworkLearner):
    """All weights are adapted to the support set from an initialisation that is learnt.

    Outer variables: the network's weights `theta`, and step sizes where `learn_lr` says so. Inner variables: a copy
    of the weights per episode, `w_0 = theta`, trained on the support set for `num_steps` steps. Outer loss: that of
    the query set at `w_T`. First-order MAML is the same learner under the backend `FirstOrder`.

    Cost: per episode, `num_steps` steps on the support set and their second derivatives, one pass over the query set.

    Args:
        network: from inputs to outputs; for classification it ends with `way` logits. It is copied.
        dynamics: the inner optimiser.
        num_steps: inner steps (unit: steps).
        learn_lr: None, or learn the step size: "one", per "step", per "parameter", or "step,parameter".
        objective: loss and figures of support and query; classification by default.

    Raises:
        ValueError: if `learn_lr` does not fit the dynamics, or the network has nothing to train.
        IncompatibleBackendError: if the network has a layer whose hypergradient PyTorch would get wrong.

    References:
        Finn, Abbeel and Levine (2017), algorithms 1 and 2, and section 5.2 (first order); Antoniou, Edwards and
        Storkey (2019), section 4 (step sizes per step).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        dynamics: Dynamics,
        num_steps: int,
        learn_lr: LearnLR = None,
        objective: Objective | None = None,
    ) -> None:
        super().__init__(network, dynamics=dynamics, num_steps=num_steps, learn_lr=learn_lr, objective=objective)

    def inner_loss(self, loss: Tensor, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the loss of the support set."""
        return loss

    def outer_loss(self, loss: Tensor, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the loss of the query set."""
        return loss
