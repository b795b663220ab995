"""Networks of the few-shot literature: one file per network."""

from hypertorch.fewshot.backbones.batch_norm import BatchNorm
from hypertorch.fewshot.backbones.conv4 import Conv4
from hypertorch.fewshot.backbones.feature_norm import FeatureNorm
from hypertorch.fewshot.backbones.mlp import MLP
from hypertorch.fewshot.backbones.resnet12 import ResNet12

__all__ = ["MLP", "BatchNorm", "Conv4", "FeatureNorm", "ResNet12"]
