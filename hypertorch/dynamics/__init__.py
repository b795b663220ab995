"""Inner optimisers as pure, differentiable maps: one file per update rule."""

from hypertorch.dynamics.adagrad import Adagrad
from hypertorch.dynamics.adam import Adam
from hypertorch.dynamics.adamw import AdamW
from hypertorch.dynamics.base import Dynamics, GradientDynamics
from hypertorch.dynamics.clipped import Clipped
from hypertorch.dynamics.groups import Groups
from hypertorch.dynamics.hyper import Hyper
from hypertorch.dynamics.learned_buffers import LearnedBuffers
from hypertorch.dynamics.learned_update import LearnedUpdate
from hypertorch.dynamics.lion import Lion
from hypertorch.dynamics.muon import Muon
from hypertorch.dynamics.nadam import NAdam
from hypertorch.dynamics.radam import RAdam
from hypertorch.dynamics.reversible import ReversibleDynamics
from hypertorch.dynamics.reversible_momentum import ReversibleMomentum
from hypertorch.dynamics.rmsprop import RMSprop
from hypertorch.dynamics.sgd import SGD
from hypertorch.dynamics.torch_optim import TorchOptim
from hypertorch.dynamics.update_rules import CoordinatewiseLSTM, CoordinatewiseMLP, UpdateRule

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Clipped",
    "CoordinatewiseLSTM",
    "CoordinatewiseMLP",
    "Dynamics",
    "GradientDynamics",
    "Groups",
    "Hyper",
    "LearnedBuffers",
    "LearnedUpdate",
    "Lion",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "ReversibleDynamics",
    "ReversibleMomentum",
    "TorchOptim",
    "UpdateRule",
]
