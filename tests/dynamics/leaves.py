"""Every update rule with a counterpart in `torch.optim`, and settings to try it with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.helpers.leaves import rules
from tests.helpers.problems import normal

SGD, Adam, AdamW = ht.dynamics.SGD, ht.dynamics.Adam, ht.dynamics.AdamW
RMSprop, Adagrad = ht.dynamics.RMSprop, ht.dynamics.Adagrad
NAdam, RAdam = ht.dynamics.NAdam, ht.dynamics.RAdam
Lion, Muon = ht.dynamics.Lion, ht.dynamics.Muon
F64 = torch.float64

# (torch's optimiser, settings); a leaf that is exported and listed nowhere fails `test_every_leaf_is_listed`.
TORCH_OPTIM: dict[type[ht.Dynamics], tuple[type[torch.optim.Optimizer], list[dict]]] = {
    SGD: (
        torch.optim.SGD,
        [
            {"lr": 0.1},
            {"lr": 0.1, "weight_decay": 0.05},
            {"lr": 0.1, "momentum": 0.9},
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
            {"lr": 0.1, "momentum": 0.9, "nesterov": True},
            {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
            {"lr": 0.01, "momentum": 0.5, "maximize": True},
            {"lr": 0.01, "momentum": 0.5, "maximize": True, "weight_decay": 0.05},
        ],
    ),
    Adam: (
        torch.optim.Adam,
        [
            {},
            {"lr": 0.1},
            {"lr": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 1e-3},
            {"lr": 0.1, "beta1": 0.0, "beta2": 0.0},
            {"lr": 0.1, "weight_decay": 0.05},
            {"lr": 0.1, "amsgrad": True, "beta2": 0.6},
            {"lr": 0.01, "maximize": True},
            {"lr": 0.01, "maximize": True, "amsgrad": True, "weight_decay": 0.05, "beta2": 0.8},
            {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": True},
        ],
    ),
    AdamW: (
        torch.optim.AdamW,
        [
            {},
            {"lr": 0.1},
            {"lr": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 1e-3},
            {"lr": 0.1, "weight_decay": 0.0},
            {"lr": 0.1, "weight_decay": 0.5},
            {"lr": 0.1, "amsgrad": True, "beta2": 0.6},
            {"lr": 0.01, "maximize": True, "weight_decay": 0.5},
        ],
    ),
    RMSprop: (
        torch.optim.RMSprop,
        [
            {},
            {"lr": 0.02},
            {"lr": 0.02, "alpha": 0.8, "eps": 1e-3},
            {"lr": 0.02, "weight_decay": 0.05},
            {"lr": 0.02, "momentum": 0.6},
            {"lr": 0.02, "centered": True},
            {"lr": 0.02, "centered": True, "momentum": 0.6, "weight_decay": 0.05, "alpha": 0.8},
            {"lr": 0.01, "maximize": True, "weight_decay": 0.05},
        ],
    ),
    Adagrad: (
        torch.optim.Adagrad,
        [
            {},
            {"lr": 0.1},
            {"lr": 0.1, "lr_decay": 0.3},
            {"lr": 0.1, "weight_decay": 0.05},
            {"lr": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3},
            {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.05, "initial_accumulator_value": 0.2},
            {"lr": 0.01, "maximize": True, "weight_decay": 0.05},
        ],
    ),
    NAdam: (
        torch.optim.NAdam,
        [
            {},
            {"lr": 0.1},
            {"lr": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 1e-3},
            {"lr": 0.1, "beta1": 0.0, "beta2": 0.0},
            {"lr": 0.1, "momentum_decay": 0.3},
            {"lr": 0.1, "momentum_decay": 0.0, "weight_decay": 0.05},
            {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": True},
            {"lr": 0.01, "maximize": True, "momentum_decay": 0.1, "weight_decay": 0.05},
        ],
    ),
    # With a beta2 of 0.6 the step is never rectified, with 0.8 from the seventh step on.
    RAdam: (
        torch.optim.RAdam,
        [
            {},
            {"lr": 0.1},
            {"lr": 0.1, "beta1": 0.7, "beta2": 0.8, "eps": 1e-2},
            {"lr": 0.05, "beta1": 0.0, "beta2": 0.6},
            {"lr": 0.1, "weight_decay": 0.05},
            {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": True, "beta2": 0.8},
            {"lr": 0.01, "maximize": True, "weight_decay": 0.05, "beta2": 0.8},
        ],
    ),
}

# Leaves without such a counterpart: the file that proves each.
OWN_TESTS: dict[str, str] = {
    "Clipped": "tests/dynamics/test_clipped.py",
    "Groups": "tests/dynamics/test_groups.py",
    "LearnedBuffers": "tests/dynamics/test_learned_buffers.py",
    "LearnedUpdate": "tests/dynamics/test_learned_update.py",
    "Lion": "tests/dynamics/test_lion.py",
    "Muon": "tests/dynamics/test_muon.py",
    "ReversibleMomentum": "tests/dynamics/test_reversible_momentum.py",
    "TorchOptim": "tests/dynamics/test_torch_optim_adapter.py",
}
# A new rule that is made of declared settings alone is found there.
OWN_TESTS |= {
    name: "tests/conformance/test_leaves.py"
    for name, leaf in rules().items()
    if name not in OWN_TESTS and leaf not in TORCH_OPTIM
}


@dataclass(frozen=True)
class Learnt:
    """A rule whose settings are learnt.

    Attributes:
        leaf: the rule.
        values: first values of the learnt settings.
        fixed: options that are not learnt.
        step_size: of the central differences; the sharper a rule bends, the smaller.
    """

    leaf: type[ht.Dynamics]
    values: dict[str, float]
    fixed: dict[str, bool] = field(default_factory=dict)
    step_size: float = 1e-3

    def __str__(self) -> str:
        return "-".join([self.leaf.__name__, *self.values, *self.fixed])

    def rule(self) -> tuple[ht.Dynamics, TensorDict]:
        """The rule with one learnt value per setting, and the outer variables."""
        rule = self.leaf(**{name: ht.Hyper(name) for name in self.values}, **self.fixed)  # type: ignore[call-arg]
        return rule, {name: torch.tensor(value, dtype=F64) for name, value in self.values.items()}

    def detailed_rule(self, shapes: dict[str, tuple[int, ...]], num_steps: int) -> tuple[ht.Dynamics, TensorDict]:
        """The rule with schedules, values per weight, and schedules of values per weight, and the outer variables."""
        settings: dict[str, ht.Hyper] = {}
        extra: TensorDict = {}
        for position, (name, value) in enumerate(self.values.items()):
            per = ("step", "parameter", "step,parameter")[position % 3]
            if name == "initial_accumulator_value":
                per = "parameter"
            steps = (num_steps,) if "step" in per else ()
            sizes = {f"{name}.{key}": (*steps, *shape) for key, shape in shapes.items()} if "par" in per else {}
            for entry, size in (sizes or {name: steps}).items():
                extra[entry] = value * (0.9 + 0.1 * normal(*size, seed=len(extra)).tanh())
            settings[name] = ht.Hyper(name, per=per)  # type: ignore[arg-type]
        return self.leaf(**settings, **self.fixed), extra  # type: ignore[call-arg]


# Every setting of every leaf, alone or with others.
LEARNT: list[Learnt] = [
    Learnt(SGD, {"lr": 0.2}),
    Learnt(SGD, {"lr": 0.2, "weight_decay": 0.03}),
    Learnt(SGD, {"lr": 0.2, "momentum": 0.7, "weight_decay": 0.03}),
    Learnt(SGD, {"lr": 0.2, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.03}),
    Learnt(SGD, {"lr": 0.2, "momentum": 0.7, "dampening": 0.2}, {"dampen_first": True}),
    Learnt(SGD, {"lr": 0.2, "momentum": 0.7, "weight_decay": 0.03}, {"nesterov": True}),
    Learnt(SGD, {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.03}, {"maximize": True}),
    Learnt(Adam, {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.03}, step_size=1e-4),
    Learnt(Adam, {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-2}, {"amsgrad": True}, step_size=1e-5),
    Learnt(Adam, {"lr": 0.05, "beta1": 0.8, "weight_decay": 0.03, "eps": 1e-2}, {"maximize": True}, step_size=1e-4),
    Learnt(Adam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.3}, {"decoupled_weight_decay": True}, step_size=1e-4),
    Learnt(AdamW, {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.3}, step_size=1e-4),
    Learnt(AdamW, {"lr": 0.05, "beta2": 0.6, "eps": 1e-2}, {"amsgrad": True, "maximize": True}, step_size=1e-4),
    Learnt(RMSprop, {"lr": 0.02, "alpha": 0.8, "eps": 1e-2, "weight_decay": 0.03}, step_size=1e-4),
    Learnt(RMSprop, {"lr": 0.02, "alpha": 0.8, "eps": 1e-2, "momentum": 0.5}, {"centered": True}, step_size=1e-4),
    Learnt(RMSprop, {"lr": 0.02, "momentum": 0.5, "eps": 1e-2}, {"maximize": True}, step_size=1e-4),
    Learnt(Adagrad, {"lr": 0.1, "eps": 1e-2}, step_size=1e-4),
    Learnt(
        Adagrad,
        {"lr": 0.1, "lr_decay": 0.2, "eps": 1e-2, "weight_decay": 0.03, "initial_accumulator_value": 0.1},
        step_size=1e-4,
    ),
    Learnt(Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1}, {"maximize": True}, step_size=1e-4),
    Learnt(
        NAdam,
        {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.03, "momentum_decay": 0.2},
        step_size=1e-4,
    ),
    Learnt(NAdam, {"lr": 0.05, "beta1": 0.8, "momentum_decay": 0.2, "eps": 1e-2}, {"maximize": True}, step_size=1e-4),
    Learnt(NAdam, {"lr": 0.05, "weight_decay": 0.3, "eps": 1e-2}, {"decoupled_weight_decay": True}, step_size=1e-4),
    Learnt(RAdam, {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2, "weight_decay": 0.03}, step_size=1e-4),
    Learnt(RAdam, {"lr": 0.1, "beta2": 0.6, "weight_decay": 0.3}, {"decoupled_weight_decay": True}, step_size=1e-4),
    Learnt(RAdam, {"lr": 0.05, "beta1": 0.8}, {"maximize": True}, step_size=1e-4),
]


@contextmanager
def double_counters() -> Iterator[None]:
    """`torch.optim` keeps numbers of its own (the momenta of NAdam, the step size of ASGD) in the default dtype."""
    torch.set_default_dtype(F64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def in_torch(settings: dict) -> dict:
    """Returns our settings as `torch.optim` calls them: a pair of betas."""
    settings = dict(settings)
    betas = (settings.pop("beta1", 0.9), settings.pop("beta2", 0.999))
    return {**settings, "betas": betas} if betas != (0.9, 0.999) else settings
