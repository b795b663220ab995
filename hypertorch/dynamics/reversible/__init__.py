"""Inner optimisers whose steps can be undone bit for bit, and the integer arithmetic that they run on."""

from hypertorch.dynamics.reversible.base import ExactState, ReversibleDynamics, reversible_rule
from hypertorch.dynamics.reversible.momentum import ReversibleMomentum

__all__ = ["ExactState", "ReversibleDynamics", "ReversibleMomentum", "reversible_rule"]
