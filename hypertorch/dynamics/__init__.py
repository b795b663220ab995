"""Inner optimisers as pure, differentiable maps: a file per update rule, and one for Adam's family."""

from hypertorch.dynamics import schedules
from hypertorch.dynamics.adagrad import Adagrad
from hypertorch.dynamics.adam import Adam, AdamW, NAdam, RAdam
from hypertorch.dynamics.base import Dynamics, GradientDynamics
from hypertorch.dynamics.clipped import Clipped
from hypertorch.dynamics.coordinatewise_rules import CoordinatewiseLSTM, CoordinatewiseMLP
from hypertorch.dynamics.declared import Range, setting
from hypertorch.dynamics.groups import Groups
from hypertorch.dynamics.learned_buffers import LearnedBuffers
from hypertorch.dynamics.learned_update import LearnedUpdate, UpdateRule
from hypertorch.dynamics.lion import Lion
from hypertorch.dynamics.muon import Muon
from hypertorch.dynamics.reversible import ReversibleDynamics, ReversibleMomentum
from hypertorch.dynamics.rmsprop import RMSprop
from hypertorch.dynamics.settings import Hyper, Setting, resolve
from hypertorch.dynamics.sgd import SGD
from hypertorch.dynamics.torch_optim import TorchOptim

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
    "Range",
    "ReversibleDynamics",
    "ReversibleMomentum",
    "Setting",
    "TorchOptim",
    "UpdateRule",
    "resolve",
    "schedules",
    "setting",
]
