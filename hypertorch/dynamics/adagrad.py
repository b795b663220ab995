"""Adagrad, as `torch.optim.Adagrad` defines it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from hypertorch.constraints import Constraint
from hypertorch.dynamics.base import GradientDynamics
from hypertorch.dynamics.elementwise import decayed, descend_quotient, safe_sqrt
from hypertorch.dynamics.hyper import Setting, check_range, is_active, is_schedule, resolve
from hypertorch.dynamics.natural_constraints import NON_NEGATIVE, POSITIVE, natural_constraints
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class Adagrad(GradientDynamics):
    """Descent along the gradient over the root of its sum of squares; every setting can be learnt.

    With `g` the gradient of the inner loss, and the sum `s`, at first `initial_accumulator_value`:

        d = g + weight_decay * w
        s = s + d^2
        w = w - lr / (1 + index * lr_decay) * d / (sqrt(s) + eps)

    The hypergradient is finite where a gradient is exactly zero, and right where it is zero whatever the outer
    variables are.

    Cost: one gradient per step; state of the size of the parameters.

    Args:
        lr: step size, at least 0.
        lr_decay: by how much the step size falls, at least 0.
        weight_decay: factor of the parameter added to its gradient, at least 0.
        initial_accumulator_value: first value of the sum, at least 0; it is read once, so it has no schedule.
        eps: added to the root in the denominator, at least 0; above 0 where a coordinate may have no gradient.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range, or `initial_accumulator_value` is a schedule.
        TypeError: if a setting is of no known kind.

    References:
        Duchi, Hazan and Singer (2011), Adaptive subgradient methods for online learning and stochastic optimization.
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = 1e-2
    lr_decay: Setting = 0.0
    weight_decay: Setting = 0.0
    initial_accumulator_value: Setting = 0.0
    eps: Setting = 1e-10
    maximize: bool = False

    def __post_init__(self) -> None:
        check_range("Adagrad", "lr", self.lr, 0.0, math.inf, "A step size is positive; to ascend, pass maximize=True.")
        check_range("Adagrad", "lr_decay", self.lr_decay, 0.0, math.inf, "A negative one would turn the step around.")
        check_range(
            "Adagrad", "weight_decay", self.weight_decay, 0.0, math.inf, "A negative one makes the weights explode."
        )
        check_range(
            "Adagrad",
            "initial_accumulator_value",
            self.initial_accumulator_value,
            0.0,
            math.inf,
            "It is a sum of squares.",
        )
        check_range("Adagrad", "eps", self.eps, 0.0, math.inf, "It keeps the denominator away from 0.")
        if is_schedule(self.initial_accumulator_value):
            raise ValueError(
                f"`initial_accumulator_value` of `Adagrad` is {self.initial_accumulator_value!r}, a schedule over "
                "steps: it is read once, before the first one. Give one value, or `Hyper(name)` to learn one."
            )

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings that may be outer variables, by name."""
        return {
            "lr": self.lr,
            "lr_decay": self.lr_decay,
            "weight_decay": self.weight_decay,
            "initial_accumulator_value": self.initial_accumulator_value,
            "eps": self.eps,
        }

    def constraints(self) -> dict[str, Constraint]:
        """Returns lr > 0, and all others >= 0, where they are learnt directly."""
        return natural_constraints(self.settings(), {**dict.fromkeys(self.settings(), NON_NEGATIVE), "lr": POSITIVE})

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the sums of squares, `sum.{parameter}`, at `initial_accumulator_value`."""
        return {
            f"sum.{name}": torch.zeros_like(param) + resolve(self.initial_accumulator_value, hparams, name, 0)
            for name, param in params.items()
        }

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and sums of squares after one step along `grads`."""
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, param in params.items():
            direction = -grads[name] if self.maximize else grads[name]
            if self._has_weight_decay:
                direction = decayed(direction, param, resolve(self.weight_decay, hparams, name, index))
            total = torch.addcmul(state[f"sum.{name}"], direction, direction)
            new_state[f"sum.{name}"] = total
            denominator = safe_sqrt(total) + resolve(self.eps, hparams, name, index)
            step_size = resolve(self.lr, hparams, name, index)
            if self._has_lr_decay:
                step_size = step_size / (1.0 + index * resolve(self.lr_decay, hparams, name, index))
            new_params[name] = descend_quotient(param, direction, denominator, step_size)
        return new_params, new_state

    @cached_property
    def _has_lr_decay(self) -> bool:
        return is_active(self.lr_decay)

    @cached_property
    def _has_weight_decay(self) -> bool:
        return is_active(self.weight_decay)
