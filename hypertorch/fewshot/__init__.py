"""Few-shot learning: episodes, data sets, backbones and learners, each learner a bilevel problem."""

from hypertorch.fewshot.backbones import MLP, BatchNorm, Conv4
from hypertorch.fewshot.datasets import ImageClasses, Omniglot, Sinusoid, StrokeCharacters
from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples
from hypertorch.fewshot.learners import (
    MAML,
    Classification,
    HyperRepresentation,
    Learner,
    Objective,
    Regression,
)
from hypertorch.fewshot.sampler import EpisodeSampler

__all__ = [
    "MAML",
    "MLP",
    "BatchNorm",
    "Classification",
    "Conv4",
    "Episode",
    "EpisodeSampler",
    "EpisodeSource",
    "Examples",
    "HyperRepresentation",
    "ImageClasses",
    "Learner",
    "Objective",
    "Omniglot",
    "Regression",
    "Sinusoid",
    "StrokeCharacters",
]
