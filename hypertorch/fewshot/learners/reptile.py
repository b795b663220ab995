"""Reptile: the shared weights move towards the weights that episodes end with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hypertorch.dynamics import Dynamics
from hypertorch.fewshot.learners.network_learner import NetworkLearner
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.types import TensorDict


class Reptile(NetworkLearner):
    """Weights are trained on each episode from the shared weights, which then move towards where they ended.

    The outer step is along `theta - w_T`, which is the gradient of the outer loss `|theta - w_T|^2 / 2` with `w_T`
    held constant. It is a direct term, so every backend returns the same; `FirstOrder` and `Truncated(window=1)` are
    the cheapest. The query set is used for figures only, so training episodes may have a larger `shot` instead.

    Cost: per episode, `num_steps` steps on the support set; no second derivatives.

    Args:
        network: from inputs to outputs; for classification it ends with `way` logits. It is copied.
        dynamics: the inner optimiser; the paper's is Adam without its first momentum.
        num_steps: inner steps (unit: steps); at least 2, as one step gives joint training.
        objective: loss and figures of support and query; classification by default.

    Raises:
        ValueError: if the network has nothing to train.
        IncompatibleBackendError: if the network has a layer whose hypergradient PyTorch would get wrong.

    References:
        Nichol, Achiam and Schulman (2018), On first-order meta-learning algorithms, algorithm 2.
    """

    def __init__(
        self, network: nn.Module, *, dynamics: Dynamics, num_steps: int, objective: Objective | None = None
    ) -> None:
        super().__init__(network, dynamics=dynamics, num_steps=num_steps, learn_lr=None, objective=objective)

    def inner_loss(self, loss: Tensor, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the loss of the support set."""
        return loss

    def outer_loss(self, loss: Tensor, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns half the squared distance from the shared weights to the fitted ones."""
        shared = {name: value for name, value in hparams.items() if name in params}
        distances = [(value - params[name].detach()).square().sum() for name, value in shared.items()]
        return 0.5 * torch.stack(distances).sum()
