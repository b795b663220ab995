"""Networks of the few-shot literature: one file per network."""

from hypertorch.fewshot.backbones.conv4 import Conv4
from hypertorch.fewshot.backbones.mlp import MLP
from hypertorch.fewshot.backbones.resnet12 import ResNet12
from hypertorch.nn.batch_norm import BatchNorm
from hypertorch.nn.feature_norm import FeatureNorm

__all__ = ["MLP", "BatchNorm", "Conv4", "FeatureNorm", "ResNet12"]
