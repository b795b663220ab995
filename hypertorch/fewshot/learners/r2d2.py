"""R2-D2: a ridge-regression head in closed form, differentiated through."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hypertorch.checks.argument_types import typed
from hypertorch.fewshot.learners.backbone_checks import first_parameter
from hypertorch.fewshot.learners.closed_form_head import ClosedFormHead
from hypertorch.types import TensorDict


class R2D2(ClosedFormHead):
    """The head is the ridge regression of one-hot labels on support features, solved exactly.

    With support features `X` (a constant 1 appended), labels `Y` and `n` examples, by Woodbury's identity

        W = X' (X X' + exp(log_ridge) I)^{-1} Y,        logits = scale * h(x) W + shift,

    a linear system of the size of the support set, not of the features. Outer variables: the representation,
    `log_ridge`, `log_scale` and `shift`. There is no inner loop: every backend that reaches the initialisation gives
    the same hypergradient.

    Cost: per episode, one pass and one vjp of the representation, and one solve of an `n x n` system.

    Args:
        backbone: from inputs to features, shape `(batch, features)`. It is copied.
        way: classes of an episode.
        ridge: first value of the ridge penalty, above 0.
        scale: first value of the factor of the regression's outputs, above 0.

    Raises:
        ValueError: if `way` is below 1, or `ridge` or `scale` is not above 0.
        IncompatibleBackendError: if the backbone has a layer whose hypergradient PyTorch would get wrong; from a
            hypergradient, if the backend does not reach the initialisation.

    References:
        Bertinetto, Henriques, Torr and Vedaldi (2019), Meta-learning with differentiable closed-form solvers,
        equations 4 to 6.
    """

    @typed("backbone", "ridge", "scale")
    def __init__(self, backbone: nn.Module, *, way: int = 5, ridge: float = 50.0, scale: float = 1.0) -> None:
        for name, value in {"ridge": ridge, "scale": scale}.items():
            # Written as what is allowed, so that NaN is refused.
            if not 0.0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}: its logarithm is learnt. Pass a finite number above 0.")
        some = first_parameter(backbone)
        super().__init__(
            backbone,
            way=way,
            own_hparams={
                # Logarithms, so that any outer step leaves both above 0.
                "log_ridge": some.new_tensor(ridge).log().detach(),
                "log_scale": some.new_tensor(scale).log().detach(),
                # As in the paper. Cross-entropy does not see it: softmax takes out what all logits share.
                "shift": some.new_zeros(()),
            },
        )

    def solve(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
        """Returns `weight`, the ridge solution, shape `(features + 1, way)`."""
        labels = F.one_hot(targets, self.way).to(support.dtype)
        features = _with_ones(support)
        gram = features @ features.T
        # Above 0, so the system is positive definite and has one solution, however alike the examples are.
        ridge = hparams["log_ridge"].exp() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        # Solved, not inverted: fewer operations, and closer in rounding.
        return {"weight": features.T @ torch.linalg.solve(gram + ridge, labels)}

    def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
        """Returns the scaled and shifted regression of the labels, shape `(batch, way)`."""
        return hparams["log_scale"].exp() * (_with_ones(features) @ head["weight"]) + hparams["shift"]


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
