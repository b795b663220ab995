"""Inner optimisers as pure, differentiable maps: one file per update rule."""

from hypertorch.dynamics.base import Dynamics, GradientDynamics
from hypertorch.dynamics.hyper import Hyper
from hypertorch.dynamics.sgd import SGD

__all__ = ["SGD", "Dynamics", "GradientDynamics", "Hyper"]
