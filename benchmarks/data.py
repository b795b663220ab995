"""Data and weights of the works, from a seed: the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Source:
    """Draws tensors on the CPU and moves them, so that a GPU sees the same numbers.

    Args:
        generator: the source of random numbers.
        device: where the tensors are wanted.
        dtype: of floating-point tensors.
    """

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def seeded(cls, seed: int, device: torch.device, dtype: torch.dtype) -> Source:
        """Returns a source that starts from a seed."""
        return cls(generator=torch.Generator().manual_seed(seed), device=device, dtype=dtype)

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def labels(self, classes: int, *shape: int) -> Tensor:
        """Returns labels `0 .. classes - 1`."""
        return torch.randint(classes, shape, generator=self.generator).to(self.device)

    def network(self, network: nn.Module) -> nn.Module:
        """Returns the network with weights drawn from this source, of variance one over a unit's inputs, and no bias.

        Scales of norm layers stay as they are, at one.
        """
        network = network.to(self.device, self.dtype)
        with torch.no_grad():
            for name, value in network.named_parameters():
                if value.dim() > 1:
                    value.copy_(self.normal(*value.shape) * value[0].numel() ** -0.5)
                elif name.endswith("bias"):
                    value.zero_()
        return network


def mlp(*widths: int) -> nn.Module:
    """Returns linear layers with tanh between them, on inputs of shape `(rows, widths[0])`."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])
