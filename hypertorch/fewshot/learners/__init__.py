"""Few-shot learners: one file per method."""

from hypertorch.fewshot.learners.anil import ANIL
from hypertorch.fewshot.learners.base import Embedding, Learner
from hypertorch.fewshot.learners.closed_form_head import ClosedFormHead
from hypertorch.fewshot.learners.feature_learner import FeatureLearner
from hypertorch.fewshot.learners.head_learner import HeadLearner
from hypertorch.fewshot.learners.hyper_representation import HyperRepresentation
from hypertorch.fewshot.learners.imaml import IMAML
from hypertorch.fewshot.learners.maml import MAML
from hypertorch.fewshot.learners.meta_sgd import MetaSGD
from hypertorch.fewshot.learners.network_learner import NetworkLearner
from hypertorch.fewshot.learners.objectives import Classification, Objective, Regression
from hypertorch.fewshot.learners.proto_net import ProtoNet
from hypertorch.fewshot.learners.r2d2 import R2D2
from hypertorch.fewshot.learners.reptile import Reptile

__all__ = [
    "ANIL",
    "IMAML",
    "MAML",
    "R2D2",
    "Classification",
    "ClosedFormHead",
    "Embedding",
    "FeatureLearner",
    "HeadLearner",
    "HyperRepresentation",
    "Learner",
    "MetaSGD",
    "NetworkLearner",
    "Objective",
    "ProtoNet",
    "Regression",
    "Reptile",
]
