"""NAdam, as `torch.optim.NAdam` defines it: Adam with Nesterov's momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.constraints import Constraint
from hypertorch.dynamics.adam_family import BELOW_ONE
from hypertorch.dynamics.base import GradientDynamics
from hypertorch.dynamics.elementwise import decayed, descend_quotient, running_mean, running_square, safe_sqrt
from hypertorch.dynamics.hyper import Setting, check_range, is_active, resolve
from hypertorch.dynamics.natural_constraints import DECAY, NON_NEGATIVE, POSITIVE, natural_constraints
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class NAdam(GradientDynamics):
    """Adam that looks ahead along its momentum, whose weight grows over the run; every setting can be learnt.

    With `g` the gradient of the inner loss, moments `m` and `v` that are zero and a product `p` that is one at first,
    and `t = index + 1`:

        d = g + weight_decay * w
        mu(t) = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
        p = p * mu(t)
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        n = (1 - mu(t)) / (1 - p) * d + mu(t + 1) / (1 - p * mu(t + 1)) * m
        w = w - lr * n / (sqrt(v / (1 - beta2^t)) + eps)

    With `decoupled_weight_decay` the weights decay by themselves, `w = w - lr * weight_decay * w`, and `d = g`. Where
    settings follow a schedule, `mu(t + 1)` is made of the step's own values, as in `torch.optim.NAdam`.

    The hypergradient is finite where a gradient is exactly zero, and right where it is zero whatever the outer
    variables are. Where a gradient passes through zero the map bends within about `eps`, as in `Adam`.

    Cost: one gradient per step; state of twice the size of the parameters, and few numbers more.

    Args:
        lr: step size, at least 0.
        beta1: what the running mean of the gradient keeps at each step, in [0, 1).
        beta2: what the running mean of its square keeps at each step, in [0, 1).
        eps: added to the root in the denominator, at least 0; above 0 where a coordinate may have no gradient.
        weight_decay: factor of the parameter added to its gradient, at least 0.
        momentum_decay: how fast the momentum's weight grows, at least 0; at 0 it is `beta1 / 2` throughout.
        decoupled_weight_decay: let the weights decay by themselves, as in `AdamW`.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Dozat (2016), Incorporating Nesterov momentum into Adam, algorithm 2.
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = 2e-3
    beta1: Setting = 0.9
    beta2: Setting = 0.999
    eps: Setting = 1e-8
    weight_decay: Setting = 0.0
    momentum_decay: Setting = 4e-3
    decoupled_weight_decay: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        check_range("NAdam", "lr", self.lr, 0.0, math.inf, "A step size is positive; to ascend, pass maximize=True.")
        check_range("NAdam", "beta1", self.beta1, 0.0, BELOW_ONE, "At 1 the mean never learns of a gradient.")
        check_range("NAdam", "beta2", self.beta2, 0.0, BELOW_ONE, "At 1 the mean square never learns of a gradient.")
        check_range("NAdam", "eps", self.eps, 0.0, math.inf, "It keeps the denominator away from 0.")
        check_range(
            "NAdam", "weight_decay", self.weight_decay, 0.0, math.inf, "A negative one makes the weights explode."
        )
        check_range(
            "NAdam", "momentum_decay", self.momentum_decay, 0.0, math.inf, "A negative one takes the momentum below 0."
        )

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings that may be outer variables, by name."""
        return {
            "lr": self.lr,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "momentum_decay": self.momentum_decay,
        }

    def constraints(self) -> dict[str, Constraint]:
        """Returns lr > 0, betas in [0, 1), and all others >= 0, where they are learnt directly."""
        return natural_constraints(
            self.settings(),
            {**dict.fromkeys(self.settings(), NON_NEGATIVE), "lr": POSITIVE, "beta1": DECAY, "beta2": DECAY},
        )

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`, zero, and `mu_product`, one.

        The product has one number for every entry of the parameter's first axis, which may count the tasks, and one for
        every weight only where `beta1` or `momentum_decay` has.
        """
        return {
            **tree.with_prefix("exp_avg", tree.zeros_like(params)),
            **tree.with_prefix("exp_avg_sq", tree.zeros_like(params)),
            **tree.with_prefix("mu_product", {name: self._ones(name, params[name], hparams) for name in params}),
        }

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params, moments and products after one step along `grads`."""
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, param in params.items():
            direction = -grads[name] if self.maximize else grads[name]
            lr = resolve(self.lr, hparams, name, index)
            beta1, beta2 = resolve(self.beta1, hparams, name, index), resolve(self.beta2, hparams, name, index)
            if self._has_weight_decay:
                weight_decay = resolve(self.weight_decay, hparams, name, index)
                if self.decoupled_weight_decay:
                    param = (1.0 - lr * weight_decay) * param
                else:
                    direction = decayed(direction, param, weight_decay)
            growth = resolve(self.momentum_decay, hparams, name, index)
            mu, mu_next = _momentum(beta1, growth, index + 1), _momentum(beta1, growth, index + 2)
            product = state[f"mu_product.{name}"] * mu
            mean = running_mean(state[f"exp_avg.{name}"], direction, beta1)
            square = running_square(state[f"exp_avg_sq.{name}"], direction, beta2)
            new_state[f"exp_avg.{name}"], new_state[f"exp_avg_sq.{name}"] = mean, square
            new_state[f"mu_product.{name}"] = product
            ahead = (1.0 - mu) / (1.0 - product) * direction + mu_next / (1.0 - product * mu_next) * mean
            root = safe_sqrt(square) / (1.0 - beta2 ** (index + 1)) ** 0.5
            denominator = root + resolve(self.eps, hparams, name, index)
            new_params[name] = descend_quotient(param, ahead, denominator, lr)
        return new_params, new_state

    def _ones(self, name: str, param: Tensor, hparams: TensorDict) -> Tensor:
        shapes = [param.shape[:1] + (1,) * (param.dim() - 1)]
        for setting in (self.beta1, self.momentum_decay):
            value = resolve(setting, hparams, name, 0)
            shapes += [value.shape] if isinstance(value, Tensor) else []
        return param.new_ones(torch.broadcast_shapes(*shapes))

    @cached_property
    def _has_weight_decay(self) -> bool:
        return is_active(self.weight_decay)


def _momentum(beta1: float | Tensor, momentum_decay: float | Tensor, step: int) -> float | Tensor:
    """Returns `mu(t)`, the weight of the momentum at a step that is counted from 1."""
    return beta1 * (1.0 - 0.5 * 0.96 ** (step * momentum_decay))
