"""Data sets of classes to draw episodes from, and sources of ready episodes."""

from hypertorch.fewshot.datasets.cifar_fs import CIFARFS as CIFARFS
from hypertorch.fewshot.datasets.image_classes import ImageClasses as ImageClasses
from hypertorch.fewshot.datasets.image_folder import ImageFolder as ImageFolder
from hypertorch.fewshot.datasets.mini_imagenet import MiniImageNet as MiniImageNet
from hypertorch.fewshot.datasets.omniglot import Omniglot as Omniglot
from hypertorch.fewshot.datasets.sinusoid import Sinusoid as Sinusoid
from hypertorch.fewshot.datasets.strokes import StrokeCharacters as StrokeCharacters
from hypertorch.fewshot.datasets.tensor_classes import TensorClasses as TensorClasses
