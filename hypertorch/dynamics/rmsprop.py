"""RMSprop, as `torch.optim.RMSprop` defines it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hypertorch import tree
from hypertorch.constraints import Constraint
from hypertorch.dynamics.base import GradientDynamics
from hypertorch.dynamics.elementwise import (
    decayed,
    descend,
    descend_quotient,
    running_mean,
    running_square,
    safe_sqrt,
)
from hypertorch.dynamics.hyper import Setting, check_range, is_active, resolve
from hypertorch.dynamics.natural_constraints import DECAY, NON_NEGATIVE, POSITIVE, PROPORTION, natural_constraints
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class RMSprop(GradientDynamics):
    """Descent along the gradient over the root of its mean square; every setting can be learnt.

    With `g` the gradient of the inner loss, and buffers `v`, `a` and `b` that are zero at first:

        d = g + weight_decay * w
        v = alpha * v + (1 - alpha) * d^2
        a = alpha * a + (1 - alpha) * d                     if centered
        r = d / (sqrt(v - a^2  if centered else  v) + eps)
        b = momentum * b + r                                with momentum
        w = w - lr * (b  with momentum, else  r)

    The hypergradient is finite where a gradient is exactly zero, and right where it is zero whatever the outer
    variables are. Where the centred mean square of a coordinate vanishes by rounding, it counts as zero.

    Cost: one gradient per step; state of the size of the parameters, and once more each if centred and with momentum.

    Args:
        lr: step size, at least 0.
        alpha: what the running mean of the squared gradient keeps at each step, in [0, 1].
        eps: added to the root in the denominator, at least 0; above 0 where a coordinate may have no gradient.
        weight_decay: factor of the parameter added to its gradient, at least 0.
        momentum: of the scaled gradient, in [0, 1].
        centered: divide by the standard deviation of the gradient.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Tieleman and Hinton (2012), lecture 6.5, rmsprop; Graves (2013), Generating sequences with recurrent neural
        networks, equations 38 to 41 (centred).
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = 1e-2
    alpha: Setting = 0.99
    eps: Setting = 1e-8
    weight_decay: Setting = 0.0
    momentum: Setting = 0.0
    centered: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        check_range("RMSprop", "lr", self.lr, 0.0, math.inf, "A step size is positive; to ascend, pass maximize=True.")
        check_range("RMSprop", "alpha", self.alpha, 0.0, 1.0, "At 1 the mean square never learns of a gradient.")
        check_range("RMSprop", "eps", self.eps, 0.0, math.inf, "It keeps the denominator away from 0.")
        check_range(
            "RMSprop", "weight_decay", self.weight_decay, 0.0, math.inf, "A negative one makes the weights explode."
        )
        check_range("RMSprop", "momentum", self.momentum, 0.0, 1.0, "At 1 the buffer never forgets; 0.9 is usual.")

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings that may be outer variables, by name."""
        return {
            "lr": self.lr,
            "alpha": self.alpha,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
        }

    def constraints(self) -> dict[str, Constraint]:
        """Returns lr > 0, eps and weight_decay >= 0, alpha in [0, 1] and momentum in [0, 1), where learnt directly."""
        return natural_constraints(
            self.settings(),
            {
                "lr": POSITIVE,
                "alpha": PROPORTION,
                "eps": NON_NEGATIVE,
                "weight_decay": NON_NEGATIVE,
                "momentum": DECAY,
            },
        )

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns `square_avg.{parameter}`, and `grad_avg` and `momentum_buffer` where they are used, zero."""
        names = ["square_avg"]
        names += ["grad_avg"] if self.centered else []
        names += ["momentum_buffer"] if self._has_momentum else []
        return {key: value for name in names for key, value in tree.with_prefix(name, tree.zeros_like(params)).items()}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and buffers after one step along `grads`."""
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, param in params.items():
            direction = -grads[name] if self.maximize else grads[name]
            if self._has_weight_decay:
                direction = decayed(direction, param, resolve(self.weight_decay, hparams, name, index))
            lr, alpha = resolve(self.lr, hparams, name, index), resolve(self.alpha, hparams, name, index)
            square = running_square(state[f"square_avg.{name}"], direction, alpha)
            new_state[f"square_avg.{name}"] = square
            if self.centered:
                mean = running_mean(state[f"grad_avg.{name}"], direction, alpha)
                new_state[f"grad_avg.{name}"] = mean
                square = square - mean.square()
            denominator = safe_sqrt(square) + resolve(self.eps, hparams, name, index)
            if self._has_momentum:
                momentum = resolve(self.momentum, hparams, name, index)
                buffer = momentum * state[f"momentum_buffer.{name}"] + direction / denominator
                new_state[f"momentum_buffer.{name}"] = buffer
                new_params[name] = descend(param, buffer, lr)
            else:
                new_params[name] = descend_quotient(param, direction, denominator, lr)
        return new_params, new_state

    @cached_property
    def _has_momentum(self) -> bool:
        return is_active(self.momentum)

    @cached_property
    def _has_weight_decay(self) -> bool:
        return is_active(self.weight_decay)
