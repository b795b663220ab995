"""What a learner's outputs are judged by: the loss of support and query, and the figures reported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hypertorch.checks.argument_types import check_fields
from hypertorch.problem import OuterProblem
from hypertorch.types import Batch, TensorDict


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

    Raises:
        ValueError: if `label_smoothing` is out of range.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "label_smoothing")
        # Written as what is allowed, so that NaN is refused.
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"`label_smoothing` is {self.label_smoothing!r}, outside [0, 1): it is the share of the target that "
                "does not go to the label. Use 0 for none; 0.1 is usual."
            )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy (unit: nats).

        Args:
            outputs: logits, shape `(batch, way)`.
            targets: int64 labels, shape `(batch,)`.

        Raises:
            ValueError: if there is not one row of logits per label.
            TypeError: if the labels are of another type than int64.
        """
        # Written out in both methods: a helper would cost a call at every inner step.
        if outputs.dim() != 2 or targets.shape != outputs.shape[:1] or targets.dtype != torch.int64:
            raise _no_labels(outputs, targets)
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def metrics(self, outputs: Tensor, targets: Tensor) -> TensorDict:
        """Returns `accuracy`, the share of examples whose largest logit is the label's; raises as `loss` does."""
        if outputs.dim() != 2 or targets.shape != outputs.shape[:1] or targets.dtype != torch.int64:
            raise _no_labels(outputs, targets)
        return {"accuracy": (outputs.argmax(dim=-1) == targets).to(outputs.dtype).mean()}


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """Mean squared error; reports `mse`."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean squared error.

        Args:
            outputs: values, of any shape.
            targets: floating-point values of the same shape.

        Raises:
            ValueError: if the shapes differ.
            TypeError: if the targets are no floating-point values.
        """
        # PyTorch would broadcast (n, 1) against (n,): every output meets every target, and the network learns their
        # mean.
        if outputs.shape != targets.shape or not targets.dtype.is_floating_point:
            raise _no_values(outputs, targets)
        # `F.mse_loss` with a constant target lacks a forward-mode rule in PyTorch.
        return (outputs - targets).square().mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> TensorDict:
        """Returns `mse`; raises as `loss` does."""
        return {"mse": self.loss(outputs, targets)}


def chosen_objective(objective: Objective | None) -> Objective:
    """Returns the objective of a learner, classification by default.

    Raises:
        TypeError: if it is no `Objective`.
    """
    if objective is None:
        return Classification()
    if not isinstance(objective, Objective):
        raise TypeError(
            f"`objective` is {objective!r}, not an `Objective`: a learner takes its losses and figures from it. Pass "
            "`Classification()`, `Regression()`, an instance of a subclass of yours, or None for classification."
        )
    return objective


def _no_labels(outputs: Tensor, targets: Tensor) -> Exception:
    """Returns the error for targets that are not one label per row of logits."""
    # Cross-entropy itself would take shares of the classes; the accuracy could not.
    if outputs.dim() == 2 and targets.shape == outputs.shape and targets.dtype.is_floating_point:
        return ValueError(
            f"`targets` have the shape {tuple(targets.shape)} of the logits: they are shares of the classes, of which "
            "an accuracy cannot be taken. Pass one label per row; `label_smoothing` spreads it over the classes, and "
            "an `Objective` of your own takes any targets."
        )
    if outputs.dim() != 2 or targets.shape != outputs.shape[:1]:
        return ValueError(
            f"`outputs` have shape {tuple(outputs.shape)} for labels of shape {tuple(targets.shape)}: "
            "classification needs one row of logits per label. End the network with a layer of `way` outputs, and "
            "pass labels of shape `(batch,)`."
        )
    return TypeError(
        f"`targets` are of {targets.dtype}: classification takes labels that count classes. Convert them, "
        "`labels.long()`; for values that are no classes, build the learner with `objective=Regression()`."
    )


def _no_values(outputs: Tensor, targets: Tensor) -> Exception:
    """Returns the error for targets that are not one value per output."""
    if not targets.dtype.is_floating_point:
        return TypeError(
            f"`targets` are of {targets.dtype}: regression takes floating-point values. Convert them, "
            f"`targets.to({outputs.dtype})`; for labels of classes, use the objective `Classification()`."
        )
    return ValueError(
        f"`outputs` have shape {tuple(outputs.shape)} and `targets` {tuple(targets.shape)}: their difference would "
        "pair every output with every target. Give both the same shape: `targets.unsqueeze(-1)` for a network with "
        "one output, or as many outputs as an example has values."
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class QuerySet(OuterProblem):
    """Abstract: judges by an objective on examples that are the same at every outer step.

    A subclass writes `loss` and `metrics`.

    Args:
        objective: loss and metrics.
        examples: what is judged on. An episode belongs to one outer step, so there is one batch.
        initial: the outer variables before training.
    """

    objective: Objective
    examples: Batch
    initial: TensorDict

    def init_hparams(self) -> TensorDict:
        """Returns the outer variables before training."""
        return self.initial

    def batch(self, outer_step: int) -> Batch:
        """Returns the examples."""
        return self.examples
