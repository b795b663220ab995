"""hypertorch: bilevel optimisation and meta-learning in PyTorch, with hypergradients whose numbers can be trusted."""

from hypertorch import constraints, dynamics, errors, hypergradients, tree
from hypertorch.diagnostics import DirectionalCheck, HypergradientCheck, check_hypergradient
from hypertorch.dynamics import Dynamics, GradientDynamics, Hyper
from hypertorch.functional import FunctionalModule
from hypertorch.hypergradients import Hypergradient, HypergradientResult, hypergradient
from hypertorch.minibatches import Minibatches
from hypertorch.problem import BilevelProblem, InnerProblem, OuterProblem, ProblemSource
from hypertorch.unroll import UnrollResult, unroll

__version__ = "0.1.0"

__all__ = [
    "BilevelProblem",
    "DirectionalCheck",
    "Dynamics",
    "FunctionalModule",
    "GradientDynamics",
    "Hyper",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientResult",
    "InnerProblem",
    "Minibatches",
    "OuterProblem",
    "ProblemSource",
    "UnrollResult",
    "check_hypergradient",
    "constraints",
    "dynamics",
    "errors",
    "hypergradient",
    "hypergradients",
    "tree",
    "unroll",
]
