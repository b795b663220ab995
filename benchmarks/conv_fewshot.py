"""Few-shot learners on images with the four-block convolutional network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

import hypertorch as ht
from benchmarks import variants
from benchmarks.contestant import Contestant
from benchmarks.data import Source
from benchmarks.episodes import hyper_representation_job, maml_job
from benchmarks.job import Job
from benchmarks.work import Target, Work
from hypertorch.fewshot import MAML, Classification, Conv4, Episode, Examples, HyperRepresentation

_WAY = 5


@dataclass(frozen=True, kw_only=True)
class _ConvFewShot(Work):
    """Abstract: 5-way 1-shot episodes of 28 x 28 grey images (noise: their content costs nothing), Conv-4.

    Args:
        num_tasks: episodes in the batch.
        downsample: "max_pool" or "stride".
        num_steps: inner steps.
        channels: width of the network.
        num_queries: query images per class.
        image_size: pixels of a side.
    """

    num_tasks: int = 4
    downsample: Literal["max_pool", "stride"] = "max_pool"
    num_steps: int = 5
    channels: int = 64
    num_queries: int = 15
    image_size: int = 28

    @property
    @abstractmethod
    def learner(self) -> str:
        """The learner's name."""

    @property
    def title(self) -> str:
        """What is computed."""
        return (
            f"{self.learner}, Conv-4 ({self.channels} channels, {self.downsample.replace('_', '-')}), 5-way 1-shot, "
            f"{self.num_tasks} tasks, {self.num_steps} steps"
        )

    def backbone(self, source: Source, way: int | None) -> Conv4:
        """Returns the network, with a classifier unless `way` is None."""
        network = Conv4(
            in_channels=1, image_size=self.image_size, hidden=self.channels, way=way, downsample=self.downsample
        )
        source.network(network)
        return network

    def episode(self, source: Source) -> Episode:
        """Returns the batch of episodes."""
        return Episode(*(self._examples(source, each) for each in (1, self.num_queries)))

    def _examples(self, source: Source, each: int) -> Examples:
        images = source.normal(self.num_tasks, _WAY * each, 1, self.image_size, self.image_size)
        labels = torch.arange(_WAY, device=source.device).repeat_interleave(each)
        return Examples(images, labels.expand(self.num_tasks, -1).contiguous())

    def contestants(self) -> Mapping[str, Contestant]:
        """Returns who takes part."""
        return variants.chosen(
            *variants.PEERS,
            variants.TORCHOPT_VECTORISED,
            variants.EAGER,
            variants.COMPILED,
            *variants.IN_JAX,
            variants.JAX_IN_TURN,
            variants.PLAIN,
        )

    def targets(self) -> tuple[Target, ...]:
        """Returns the ratios to be reached."""
        return (
            Target(contestant=variants.EAGER, quantity="time", against="peers", at_most=1.05),
            Target(contestant=variants.EAGER, quantity="memory", against="peers", at_most=1.0),
            *(
                Target(contestant=variants.EAGER, quantity="time", against=name, at_most=0.8)
                for name in (*variants.IN_JAX, variants.JAX_IN_TURN)
            ),
        )

    def tiny(self) -> _ConvFewShot:
        """Returns the same work in sizes that take no time."""
        return replace(self, num_tasks=2, num_steps=2, channels=2, num_queries=1, image_size=16)


@dataclass(frozen=True, kw_only=True)
class ConvMAML(_ConvFewShot):
    """MAML: all weights are adapted in each episode."""

    @property
    def learner(self) -> str:
        """The learner's name."""
        return "MAML"

    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data."""
        source = Source.seeded(seed, device, dtype)
        network, lr = self.backbone(source, _WAY), 0.1
        learner = MAML(network, dynamics=ht.dynamics.SGD(lr=lr), num_steps=self.num_steps)
        return maml_job(
            learner,
            network,
            Classification(),
            self.episode(source),
            num_steps=self.num_steps,
            lr=lr,
            stated_network=("conv4", {"downsample": self.downsample}),
        )


@dataclass(frozen=True, kw_only=True)
class ConvHyperRepresentation(_ConvFewShot):
    """Hyper-representation: a linear head is adapted in each episode, the convolutions are learnt."""

    @property
    def learner(self) -> str:
        """The learner's name."""
        return "HyperRepresentation"

    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data."""
        source = Source.seeded(seed, device, dtype)
        backbone, lr = self.backbone(source, None), 0.1
        learner = HyperRepresentation(backbone, way=_WAY, dynamics=ht.dynamics.SGD(lr=lr), num_steps=self.num_steps)
        episode = self.episode(source)
        return hyper_representation_job(
            learner,
            backbone,
            episode,
            way=_WAY,
            num_steps=self.num_steps,
            lr=lr,
            stated_network=("conv4", {"downsample": self.downsample}),
        )
