"""hypertorch: bilevel optimisation and meta-learning in PyTorch, with hypergradients whose numbers can be trusted."""

from hypertorch import constraints, dynamics, errors, hypergradients, tree
from hypertorch.constraints import BoundedSum, Box, Constraint, Positive, Simplex
from hypertorch.diagnostics import DirectionalCheck, HypergradientCheck, check_hypergradient
from hypertorch.dynamics import Dynamics, GradientDynamics, Hyper
from hypertorch.functional import FunctionalModule
from hypertorch.hypergradients import Hypergradient, HypergradientResult, hypergradient
from hypertorch.minibatches import Minibatches
from hypertorch.outer import (
    Checkpoint,
    Checkpoints,
    Estimate,
    JsonLinesLogger,
    Logger,
    MemoryLogger,
    OuterLoop,
    Report,
    TensorBoardLogger,
    Trained,
    Validation,
    evaluate,
    load_hparams,
    save_hparams,
)
from hypertorch.problem import BilevelProblem, InnerProblem, OuterProblem, ProblemSource
from hypertorch.unroll import UnrollResult, unroll

__version__ = "0.1.0"

__all__ = [
    "BilevelProblem",
    "BoundedSum",
    "Box",
    "Checkpoint",
    "Checkpoints",
    "Constraint",
    "DirectionalCheck",
    "Dynamics",
    "Estimate",
    "FunctionalModule",
    "GradientDynamics",
    "Hyper",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientResult",
    "InnerProblem",
    "JsonLinesLogger",
    "Logger",
    "MemoryLogger",
    "Minibatches",
    "OuterLoop",
    "OuterProblem",
    "Positive",
    "ProblemSource",
    "Report",
    "Simplex",
    "TensorBoardLogger",
    "Trained",
    "UnrollResult",
    "Validation",
    "check_hypergradient",
    "constraints",
    "dynamics",
    "errors",
    "evaluate",
    "hypergradient",
    "hypergradients",
    "load_hparams",
    "save_hparams",
    "tree",
    "unroll",
]
