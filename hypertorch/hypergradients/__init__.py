"""Ways to compute the hypergradient: one file per backend, and the front door `hypergradient`."""

from hypertorch.hypergradients.api import hypergradient, hypergradient_task_route
from hypertorch.hypergradients.base import BackendResult, Hypergradient, HypergradientResult
from hypertorch.hypergradients.reverse import Reverse

__all__ = [
    "BackendResult",
    "Hypergradient",
    "HypergradientResult",
    "Reverse",
    "hypergradient",
    "hypergradient_task_route",
]
