"""Few-shot learning: episodes, data sets, backbones and learners, each learner a bilevel problem."""

from hypertorch.fewshot.augmentation import Augmentation, Normalisation
from hypertorch.fewshot.backbones import MLP, BatchNorm, Conv4, FeatureNorm, ResNet12
from hypertorch.fewshot.datasets import (
    CIFARFS,
    ImageClasses,
    ImageFolder,
    MiniImageNet,
    Omniglot,
    Sinusoid,
    StrokeCharacters,
)
from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples
from hypertorch.fewshot.learners import (
    ANIL,
    IMAML,
    MAML,
    R2D2,
    Classification,
    Embedding,
    HeadLearner,
    HyperRepresentation,
    Learner,
    MetaSGD,
    NetworkLearner,
    Objective,
    ProtoNet,
    Regression,
    Reptile,
)
from hypertorch.fewshot.sampler import EpisodeSampler

__all__ = [
    "ANIL",
    "CIFARFS",
    "IMAML",
    "MAML",
    "MLP",
    "R2D2",
    "Augmentation",
    "BatchNorm",
    "Classification",
    "Conv4",
    "Embedding",
    "Episode",
    "EpisodeSampler",
    "EpisodeSource",
    "Examples",
    "FeatureNorm",
    "HeadLearner",
    "HyperRepresentation",
    "ImageClasses",
    "ImageFolder",
    "Learner",
    "MetaSGD",
    "MiniImageNet",
    "NetworkLearner",
    "Normalisation",
    "Objective",
    "Omniglot",
    "ProtoNet",
    "Regression",
    "Reptile",
    "ResNet12",
    "Sinusoid",
    "StrokeCharacters",
]
