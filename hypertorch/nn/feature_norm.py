"""Features of a bounded length: centred and scaled over the batch, so that a classifier on them is well conditioned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.nn.batch_norm import Statistics, check_features, check_statistics

_TINY = 1e-12  # keeps the derivative of the root finite where all features are equal


class FeatureNorm(nn.Module):
    """Centres features over the batch, and scales them all by one number: `length * (f - mean) / spread`.

    `spread` is the root mean square distance from the mean, so the root mean square length of the result is `length`,
    whatever the network before it learns. The curvature of a softmax classifier on the result is then at most
    `length ** 2 / 2`, and centred features leave it no direction that is far steeper than the others: an inner loop
    of a fixed step size stays stable while the outer variables change, and comes near its minimum in few steps.

    The rule of `statistics` is that of `BatchNorm`: the mean and spread of the call (`"episode"`), or in evaluation
    mode those of the last call in training mode (`"running"`). Nothing is learnt.

    Shapes: input and output `(batch, features)`.

    Args:
        features: numbers per item.
        length: root mean square length of the result, above 0.
        statistics: the rule.

    Raises:
        ValueError: if `length` is not a finite number above 0, or the rule is unknown.
    """

    running_mean: Tensor
    running_spread: Tensor

    @typed("features", "length")
    def __init__(self, features: int, *, length: float, statistics: Statistics = "episode") -> None:
        super().__init__()
        if not (length > 0.0 and math.isfinite(length)):
            raise ValueError(
                f"`length` is {length}, to which no features can be scaled. Pass a finite number above 0, such as 10."
            )
        check_statistics(statistics)
        check_features(features)
        self.length = length
        self.statistics = statistics
        if statistics == "running":
            self.register_buffer("running_mean", torch.zeros(features))
            self.register_buffer("running_spread", torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """Returns the centred and scaled features."""
        mean, spread = self._statistics(features)
        return (features - mean) * (self.length / spread)

    def extra_repr(self) -> str:
        """Returns the length and the rule, for printing."""
        return f"length={self.length}, statistics={self.statistics!r}"

    def _statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.statistics == "running" and not self.training:
            return self.running_mean, self.running_spread
        mean, spread = mean_and_spread(features)
        if self.statistics == "running":
            # In place and with its graph, as `BatchNorm` does it.
            self.running_mean.copy_(mean)
            self.running_spread.copy_(spread)
        return mean, spread


def mean_and_spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean over the batch, and the root mean square distance from it.

    Args:
        features: shape `(batch, features)`.

    Returns:
        The mean, shape `(features,)`, and the spread, a scalar above 0.
    """
    mean = features.mean(dim=0)
    return mean, (features - mean).square().sum(dim=1).mean().add(_TINY).sqrt()
