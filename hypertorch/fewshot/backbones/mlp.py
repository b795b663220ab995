"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import is_count
from hypertorch.nn.feature_norm import FeatureNorm


class MLP(nn.Module):
    """Linear layers with ReLU between them, on flattened inputs.

    Shapes: input `(batch, ...)` with `in_features` numbers per item; output `(batch, out_features)`.

    Args:
        in_features: numbers per item.
        hidden: widths of the hidden layers; (40, 40) is MAML's sinusoid network.
        out_features: number of outputs; None ends with the last hidden layer, for features.
        feature_length: centre what the hidden layers give and scale it to this root mean square length
            (`FeatureNorm`), before the last layer if there is one; None leaves it as it is.

    Attributes:
        num_features: numbers per item before the last layer.

    Raises:
        ValueError: if a number is out of range, or there is no layer at all.
    """

    @typed("hidden", "feature_length")
    def __init__(
        self,
        *,
        in_features: int = 1,
        hidden: Sequence[int] = (40, 40),
        out_features: int | None = 1,
        feature_length: float | None = None,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        if not all(map(is_count, [*widths, 1 if out_features is None else out_features])):
            raise ValueError(
                f"`in_features`, `hidden` and `out_features` are {in_features}, {tuple(hidden)} and {out_features}: a "
                "layer has at least one unit. Use positive whole numbers."
            )
        # Without hidden layers the inputs are the features, and the network is linear.
        self.num_features = widths[-1]
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        if feature_length is not None:
            # By the statistics of the call: there is no norm layer here whose rule it could share.
            layers.append(FeatureNorm(widths[-1], length=feature_length))
        if out_features is not None:
            layers.append(nn.Linear(widths[-1], out_features))
        elif not hidden:
            raise ValueError(
                "`hidden` is empty and `out_features` is None: the network would have no layer. Give one of them."
            )
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the last layer's outputs."""
        return self.layers(inputs)
