"""A few-shot learner whose weights are inner variables, with feature-wise transformations that are drawn at random."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hypertorch.autodiff.noise import mix
from hypertorch.fewshot import BatchNorm, ClosedFormHead, Conv4, Episode, EpisodeSampler, Examples
from hypertorch.types import TensorDict, TensorMapping

Episodes: TypeAlias = tuple[Episode, ...]


class Transformation(nn.Module):
    """Scales and shifts every channel; leaves it as it is at first.

    Args:
        channels: how many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Returns features of the same shape, `(batch, channels, height, width)`."""
        return torch.addcmul(self.shift[:, None, None], features, self.scale[:, None, None])


def with_transformations(network: Conv4) -> Conv4:
    """Returns the network with a `Transformation` after each norm and SiLU in place of ReLU; it is changed.

    The gradient of a ReLU net jumps where a unit switches on, and so do the weights after a step. Their derivative by
    the strength of the noise would lack these jumps.
    """
    for block in network.blocks:
        if isinstance(block, nn.Sequential):
            norm = block.get_submodule("norm")
            assert isinstance(norm, BatchNorm)
            block.norm = nn.Sequential(norm, Transformation(norm.weight.numel()))
            block.relu = nn.SiLU()
    return network


class TransformedLearner:
    """A few-shot learner whose weights are trained by an inner loop, with transformations that are drawn at random.

    Args:
        learner: whose representation has `Transformation` layers.

    Attributes:
        first_weights: all weights but those of the transformations, before training.
    """

    def __init__(self, learner: ClosedFormHead) -> None:
        self._learner = learner
        weights = learner.init_hparams()
        self._names = [name.removesuffix(".scale") for name in weights if name.endswith(".scale")]
        parts = {f"{name}.{part}" for name in self._names for part in ("scale", "shift")}
        self._unchanged = {name: weights[name] for name in weights if name in parts}
        self.first_weights = {name: value for name, value in weights.items() if name not in parts}

    def noise_of(self, gamma: float, beta: float) -> TensorDict:
        """Returns outer variables of the same strengths in every channel, before the softplus."""
        found = {}
        for index, name in enumerate(self._names):
            like = self._unchanged[f"{name}.scale"]
            found[f"layer{index + 1}.gamma"] = torch.full_like(like, gamma)
            found[f"layer{index + 1}.beta"] = torch.full_like(like, beta)
        return found

    def draw(self, *key: int) -> TensorDict:
        """Returns standard normal numbers, one for each entry of the outer variables, a function of the key."""
        generator = torch.Generator().manual_seed(mix(*key) >> 1)
        return {
            name: torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
            for name, value in self.noise_of(0.0, 0.0).items()
        }

    def disturbed(self, weights: TensorMapping, hparams: TensorMapping, drawn: TensorMapping) -> TensorDict:
        """Returns the weights with transformations of the strengths that the outer variables say.

        Args:
            weights: those that are trained.
            hparams: the outer variables.
            drawn: standard normal numbers; see `draw`.
        """
        found = dict(weights)
        for index, name in enumerate(self._names):
            gamma, beta = f"layer{index + 1}.gamma", f"layer{index + 1}.beta"
            found[f"{name}.scale"] = 1.0 + F.softplus(hparams[gamma]) * drawn[gamma]
            found[f"{name}.shift"] = F.softplus(hparams[beta]) * drawn[beta]
        return found

    def answers(self, weights: TensorMapping, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Returns the logits of the queries of all episodes, shape `(queries, way)`, and their labels.

        Args:
            weights: those that are trained; transformations that are missing do nothing.
            episodes: on which a head is solved for, each on its own.
        """
        own = {**self._unchanged, **weights}
        outputs = []
        for episode in episodes:
            support, query = self._learner.features(own, episode)
            head = self._learner.solve(support, episode.support.targets, own)
            outputs.append(self._learner.outputs(head, query, own))
        return torch.cat(outputs), torch.cat([episode.query.targets for episode in episodes])


def episodes_at(sampler: EpisodeSampler, step: int) -> Episodes:
    """Returns the episodes of a batch one by one, without a tasks axis."""
    batch = sampler.at(step)
    return tuple(
        Episode(*(Examples(part.inputs[task], part.targets[task]) for part in batch))
        for task in range(sampler.num_tasks)
    )  # fmt: skip
