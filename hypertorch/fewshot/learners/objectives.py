"""What a learner's outputs are judged by: the loss of support and query, and the figures reported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from hypertorch.types import TensorDict


class Objective(ABC):
    """The loss of a learner on support and query examples, and the figures to report."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss, a scalar.

        Args:
            outputs: shape `(batch, outputs)`.
            targets: shape `(batch,)` of labels, or `(batch, outputs)` of values.
        """

    @abstractmethod
    def metrics(self, outputs: Tensor, targets: Tensor) -> TensorDict:
        """Returns scalar figures by name."""


@dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """Cross-entropy of logits, with labels `0 .. way - 1`; reports `accuracy`, in [0, 1].

    Args:
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
    """

    label_smoothing: float = 0.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy (unit: nats).

        Raises:
            ValueError: if there is not one row of logits per label.
        """
        if outputs.dim() != 2 or targets.shape != outputs.shape[:1]:
            raise ValueError(
                f"`outputs` have shape {tuple(outputs.shape)} for labels of shape {tuple(targets.shape)}: "
                "classification needs one row of logits per label. End the network with a layer of `way` outputs."
            )
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def metrics(self, outputs: Tensor, targets: Tensor) -> TensorDict:
        """Returns `accuracy`, the share of examples whose largest logit is the label's."""
        return {"accuracy": (outputs.argmax(dim=-1) == targets).to(outputs.dtype).mean()}


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """Mean squared error; reports `mse`."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean squared error."""
        # `F.mse_loss` with a constant target lacks a forward-mode rule in PyTorch.
        return (outputs - targets).square().mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> TensorDict:
        """Returns `mse`."""
        return {"mse": (outputs - targets).square().mean()}
