"""Few-shot learners: one file per method."""

from hypertorch.fewshot.learners.base import Learner
from hypertorch.fewshot.learners.hyper_representation import HyperRepresentation
from hypertorch.fewshot.learners.maml import MAML
from hypertorch.fewshot.learners.objectives import Classification, Objective, Regression

__all__ = ["MAML", "Classification", "HyperRepresentation", "Learner", "Objective", "Regression"]
