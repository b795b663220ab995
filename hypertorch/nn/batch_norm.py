"""Batch normalisation for episodes, with a named rule for whose statistics are used."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from hypertorch.checks.argument_types import typed

Statistics: TypeAlias = Literal["episode", "running"]


class BatchNorm(nn.Module):
    """Batch normalisation over `(batch, height, width)` whose statistics follow a named rule.

    - `"episode"`: the statistics of the images passed in one call, in training and evaluation alike; nothing is
      stored. Query images then help to normalise each other: the transductive setting of MAML and most of its
      followers. State it when comparing numbers.
    - `"running"`: in training mode the statistics of the call, which are also stored (moved by `momentum`, 1 keeping
      the last call alone); in evaluation mode the stored ones. A learner fits in training mode and predicts in
      evaluation mode, so a query image is normalised by the support images only: the inductive setting.

    Scale and shift are applied outside the normalisation, and stored statistics keep their graph: PyTorch's fused
    layer is silently wrong under some nestings of `vmap` and `grad`, and drops the derivative through its statistics.

    Shapes: input and output `(batch, features, height, width)`.

    Args:
        features: channels.
        statistics: the rule.
        momentum: weight of a new call in the stored statistics, in (0, 1]; for `"running"`.
        eps: added to the variance.

    Raises:
        ValueError: if the rule is unknown.
    """

    running_mean: Tensor
    running_var: Tensor

    @typed("features", "momentum", "eps")
    def __init__(
        self, features: int, *, statistics: Statistics = "episode", momentum: float = 1.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        check_statistics(statistics)
        check_features(features)
        if not (0.0 < momentum <= 1.0 and 0.0 <= eps < math.inf):
            raise ValueError(
                f"`momentum` is {momentum} and `eps` {eps}: a running mean takes a share above 0 and up to 1 of each "
                "batch, and eps is added to a variance. Use the defaults, 1.0 and 1e-5."
            )
        self.statistics = statistics
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        if statistics == "running":
            self.register_buffer("running_mean", torch.zeros(features))
            self.register_buffer("running_var", torch.ones(features))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the normalised, scaled and shifted images."""
        if self.statistics == "running":
            normalised = self._normalise(images, *self._running_statistics(images))
        else:
            normalised = torch.nn.functional.batch_norm(images, None, None, training=True, eps=self.eps)
        return torch.addcmul(self.bias[:, None, None], normalised, self.weight[:, None, None])

    def extra_repr(self) -> str:
        """Returns the features and the rule, for printing."""
        return f"{self.weight.numel()}, statistics={self.statistics!r}"

    def _running_statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.running_mean, self.running_var
        # The biased variance, for the store too, where PyTorch's layer keeps the unbiased one: with momentum 1 a
        # query is normalised exactly as its support was.
        var, mean = torch.var_mean(images, dim=(0, 2, 3), correction=0)
        # In place, where `FunctionalModule` has put a clone: it hands the result on with its graph.
        self.running_mean.copy_(torch.lerp(self.running_mean, mean, self.momentum))
        self.running_var.copy_(torch.lerp(self.running_var, var, self.momentum))
        return mean, var

    def _normalise(self, images: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (images - mean[:, None, None]) * torch.rsqrt(var + self.eps)[:, None, None]


def check_features(features: int) -> None:
    """Raises unless there is at least one feature to normalise."""
    if features < 1:
        raise ValueError(
            f"`features` is {features}: there is nothing to normalise. Pass the number of features or channels, at "
            "least 1."
        )


def check_statistics(statistics: str) -> None:
    """Raises `ValueError` if no rule has this name."""
    if statistics not in get_args(Statistics):
        raise ValueError(
            f"`statistics` is {statistics!r}, which names no rule for batch norm. Use 'episode' (each call by its own "
            "statistics) or 'running' (query by the support's)."
        )
