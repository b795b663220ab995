"""hypertorch: bilevel optimisation and meta-learning in PyTorch, with hypergradients whose numbers can be trusted."""

from hypertorch import constraints, dynamics, errors, hypergradients, inner, linear_solvers, search, tree
from hypertorch.autodiff import live_memory
from hypertorch.constraints import BoundedSum, Box, Constraint, Positive, Simplex
from hypertorch.diagnostics import (
    Accuracy,
    BackendComparison,
    BackendFigures,
    DirectionalCheck,
    GeometricFit,
    HorizonBias,
    HorizonPoint,
    HypergradientCheck,
    Metasmoothness,
    SpectralRadius,
    check_hypergradient,
    compare_backends,
    horizon_bias,
    metasmoothness,
    spectral_radius,
)
from hypertorch.dynamics import Dynamics, GradientDynamics, Hyper
from hypertorch.hypergradients import Hypergradient, HypergradientResult, hypergradient
from hypertorch.inner import memo
from hypertorch.inner.execution import Execution
from hypertorch.inner.ranks import Ranks, join_ranks
from hypertorch.linear_solvers import LinearSolver
from hypertorch.minibatches import Minibatches
from hypertorch.nn.functional_module import FunctionalModule
from hypertorch.outer import (
    Checkpoint,
    Checkpoints,
    Estimate,
    JsonLinesLogger,
    Logger,
    MemoryLogger,
    OuterLoop,
    RealTime,
    Report,
    Snapshots,
    TensorBoardLogger,
    Trained,
    Validation,
    evaluate,
    load_hparams,
    save_hparams,
)
from hypertorch.problem import BilevelProblem, InnerProblem, OuterProblem, Problems, ProblemSource
from hypertorch.unroll import UnrollResult, unroll

__version__ = "0.1.0"

__all__ = [
    "Accuracy",
    "BackendComparison",
    "BackendFigures",
    "BilevelProblem",
    "BoundedSum",
    "Box",
    "Checkpoint",
    "Checkpoints",
    "Constraint",
    "DirectionalCheck",
    "Dynamics",
    "Estimate",
    "Execution",
    "FunctionalModule",
    "GeometricFit",
    "GradientDynamics",
    "HorizonBias",
    "HorizonPoint",
    "Hyper",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientResult",
    "InnerProblem",
    "JsonLinesLogger",
    "LinearSolver",
    "Logger",
    "MemoryLogger",
    "Metasmoothness",
    "Minibatches",
    "OuterLoop",
    "OuterProblem",
    "Positive",
    "ProblemSource",
    "Problems",
    "Ranks",
    "RealTime",
    "Report",
    "Simplex",
    "Snapshots",
    "SpectralRadius",
    "TensorBoardLogger",
    "Trained",
    "UnrollResult",
    "Validation",
    "check_hypergradient",
    "compare_backends",
    "constraints",
    "dynamics",
    "errors",
    "evaluate",
    "horizon_bias",
    "hypergradient",
    "hypergradients",
    "inner",
    "join_ranks",
    "linear_solvers",
    "live_memory",
    "load_hparams",
    "memo",
    "metasmoothness",
    "save_hparams",
    "search",
    "spectral_radius",
    "tree",
    "unroll",
]
