"""The leaves that the library exports, found by looking, so that tests cover a new one without being told of it."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch

import hypertorch as ht
from hypertorch.dynamics.declared import declared
from tests.fewshot.learners.test_learners import with_smooth_activations


def leaves(module: ModuleType, base: type) -> dict[str, Any]:
    """The concrete classes of a kind that a module exports, by name."""
    exported = {name: getattr(module, name) for name in module.__all__}
    return {
        name: item
        for name, item in exported.items()
        if inspect.isclass(item) and issubclass(item, base) and not inspect.isabstract(item)
    }


def required(kind: type) -> set[str]:
    """The arguments of a class that have no default."""
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}


def rules() -> dict[str, Any]:
    """The dynamics that are made of declared settings alone: no other rule, module or class is handed to them."""
    found = leaves(ht.dynamics, ht.Dynamics)
    return {name: leaf for name, leaf in found.items() if required(leaf) <= set(declared(leaf))}


def first_values(leaf: type) -> dict[str, float]:
    """A value of every setting of a rule at which it can be learnt: its default, or a number that is felt."""
    values = {}
    for name, declaration in declared(leaf).items():
        if declaration.never_learnt is None:
            default = inspect.signature(leaf).parameters[name].default
            start = default if isinstance(default, float) and default >= 1e-2 else 0.05
            # Within a step of central differences no value may leave its range.
            lower, upper = max(declaration.allowed.lower, 1e-2), min(declaration.allowed.upper, 0.95)
            values[name] = min(max(start, lower), upper)
    return values


def learner_of(
    leaf: Any, item: int, way: int, dynamics: ht.Dynamics, dtype: torch.dtype, *, num_steps: int = 2
) -> ht.fewshot.Learner:
    """A learner on a small network, by the arguments that its class has.

    Args:
        leaf: the class.
        item: numbers in one input.
        way: classes of an episode.
        dynamics: the inner optimiser, where the class takes one.
        dtype: of the network.
        num_steps: inner steps, where the class takes them.
    """
    torch.manual_seed(0)
    takes = inspect.signature(leaf).parameters
    network = ht.fewshot.MLP(in_features=item, hidden=(6,), out_features=way if "network" in takes else None)
    module = with_smooth_activations(network)
    offered = {"dynamics": dynamics, "num_steps": num_steps, "way": way}
    return leaf(module.to(dtype), **{name: value for name, value in offered.items() if name in takes})
