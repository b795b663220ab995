"""Ways to compute the hypergradient: one file per backend, and the front door `hypergradient`."""

from hypertorch.hypergradients.api import hypergradient, measured_execution
from hypertorch.hypergradients.base import BackendResult, Hypergradient, HypergradientResult
from hypertorch.hypergradients.evo_grad import EvoGrad
from hypertorch.hypergradients.evolution_strategies import EvolutionStrategies
from hypertorch.hypergradients.first_order import FirstOrder
from hypertorch.hypergradients.forward import Forward
from hypertorch.hypergradients.forward_gradient import ForwardGradient
from hypertorch.hypergradients.implicit import Implicit
from hypertorch.hypergradients.one_step import OneStep
from hypertorch.hypergradients.reverse import Reverse
from hypertorch.hypergradients.reverse_mode.memory_plan import MemoryPlan, plan_memory
from hypertorch.hypergradients.reversible import Reversible
from hypertorch.hypergradients.truncated import Truncated

__all__ = [
    "BackendResult",
    "EvoGrad",
    "EvolutionStrategies",
    "FirstOrder",
    "Forward",
    "ForwardGradient",
    "Hypergradient",
    "HypergradientResult",
    "Implicit",
    "MemoryPlan",
    "OneStep",
    "Reverse",
    "Reversible",
    "Truncated",
    "hypergradient",
    "measured_execution",
    "plan_memory",
]
