"""Prototypical networks: classify by distance to the mean feature of each class."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from hypertorch.fewshot.learners.closed_form_head import ClosedFormHead
from hypertorch.types import TensorDict


class ProtoNet(ClosedFormHead):
    """Each class is represented by the mean of its support features; logits are negative squared distances to them.

    With features `h(x)` and prototypes `p_k = mean_{i: y_i = k} h(x_i)`, the logit of class `k` is
    `-|h(x) - p_k|^2`. The prototypes are in closed form, so there is no inner loop: they are the first and last inner
    variables, and every backend that reaches the initialisation gives the same hypergradient.

    Cost: per episode, one pass and one vjp of the representation.

    Args:
        backbone: from inputs to features, shape `(batch, features)`. It is copied.
        way: classes of an episode.

    Raises:
        ValueError: if `way` is below 1.
        IncompatibleBackendError: if the backbone has a layer whose hypergradient PyTorch would get wrong; from a
            hypergradient, if the backend does not reach the initialisation.

    References:
        Snell, Swersky and Zemel (2017), Prototypical networks for few-shot learning, equations 1 and 2.
    """

    def __init__(self, backbone: nn.Module, *, way: int = 5) -> None:
        super().__init__(backbone, way=way)

    def solve(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
        """Returns `prototypes`, the mean support feature of each class, shape `(way, features)`."""
        # Membership as a matrix: chosen by label, the rows of a class would have a number that depends on data, which
        # `vmap` cannot have.
        members = F.one_hot(targets, self.way).to(support.dtype)
        # Equation 1. Each class has a support example (`needs_every_class`), so nothing is divided by 0.
        return {"prototypes": members.T @ support / members.sum(dim=0)[:, None]}

    def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
        """Returns the negative squared distances to the prototypes, shape `(batch, way)`."""
        # Equation 2. By differences: expanded into squares and a product, it would cancel where points are near.
        return -(features[:, None] - head["prototypes"]).square().sum(dim=-1)
