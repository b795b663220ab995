"""Fully connected nets as functions of their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from hypertorch.types import TensorDict, TensorMapping


@dataclass(frozen=True)
class MLP:
    """A fully connected net, with the weights `layer1.weight`, `layer1.bias`, `layer2.weight` and so on.

    Args:
        widths: of inputs, hidden layers and outputs.
        activation: after each layer but the last.
    """

    widths: tuple[int, ...]
    activation: Callable[[Tensor], Tensor] = torch.tanh

    def __post_init__(self) -> None:
        if min(self.widths) < 1:
            raise ValueError(f"`widths` are {list(self.widths)}: a layer needs a unit. Use 1 or more.")

    @property
    def layers(self) -> list[str]:
        """Names of the layers, first to last."""
        return [f"layer{position}" for position in range(1, len(self.widths))]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each weight, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (fan_in, fan_out) in zip(self.layers, pairwise(self.widths), strict=True):
            shapes[f"{layer}.weight"] = (fan_out, fan_in)
            shapes[f"{layer}.bias"] = (fan_out,)
        return shapes

    def draw(self, like: Tensor, scales: Mapping[str, Tensor] | None = None) -> TensorDict:
        """Returns first weights from torch's default generator, which an inner run seeds for `init_params`.

        Args:
            like: a tensor of their dtype and device.
            scales: standard deviation by name. None for `1/sqrt(fan_in)` in weights and 0 in biases.
        """
        drawn: TensorDict = {}
        for name, shape in self.shapes().items():
            if scales is not None:
                drawn[name] = scales[name] * torch.randn(shape, dtype=like.dtype, device=like.device)
            elif name.endswith("bias"):
                drawn[name] = like.new_zeros(shape)
            else:
                drawn[name] = torch.randn(shape, dtype=like.dtype, device=like.device) / shape[1] ** 0.5
        return drawn

    def __call__(self, params: TensorMapping, inputs: Tensor) -> Tensor:
        """Returns the outputs, shape `(batch, outputs)`."""
        last = self.layers[-1]
        for layer in self.layers:
            inputs = F.linear(inputs, params[f"{layer}.weight"], params[f"{layer}.bias"])
            inputs = inputs if layer == last else self.activation(inputs)
        return inputs


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of right answers, shape `()`."""
    return (outputs.argmax(dim=-1) == labels).to(outputs.dtype).mean()


def error_rate(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of wrong answers, shape `()`."""
    return 1.0 - accuracy(outputs, labels)
