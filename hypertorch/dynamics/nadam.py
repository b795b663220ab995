"""NAdam, as `torch.optim.NAdam` defines it: Adam with Nesterov's momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch.dynamics.base import GradientDynamics, zero_buffers
from hypertorch.dynamics.declared import (
    EPS,
    MEAN_DECAY,
    NON_NEGATIVE,
    SQUARE_DECAY,
    STEP_SIZE_EITHER_WAY,
    WEIGHT_DECAY,
    Range,
    setting,
)
from hypertorch.dynamics.elementwise import decayed, descend_quotient, running_mean, running_square, safe_sqrt
from hypertorch.dynamics.settings import Setting, resolve
from hypertorch.types import TensorDict

_GROWTH = Range(0.0, math.inf, NON_NEGATIVE, "A negative one takes the momentum below 0.")


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

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 2e-3)
    beta1: Setting = setting(MEAN_DECAY, 0.9)
    beta2: Setting = setting(SQUARE_DECAY, 0.999)
    eps: Setting = setting(EPS, 1e-8)
    weight_decay: Setting = setting(WEIGHT_DECAY, 0.0)
    momentum_decay: Setting = setting(_GROWTH, 4e-3)
    decoupled_weight_decay: bool = False
    maximize: bool = False

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`, zero, and `mu_product`, one.

        The product has one number for every entry of the parameter's first axis, which may count the tasks, and one for
        every weight only where `beta1` or `momentum_decay` has.
        """
        products = {f"mu_product.{name}": self._ones(name, param, hparams) for name, param in params.items()}
        return {**zero_buffers(params, "exp_avg", "exp_avg_sq"), **products}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params, moments and products after one step along `grads`."""
        lr, beta1, beta2, eps, weight_decay, momentum_decay = self.values(params, hparams, index)
        t = index + 1
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, w in params.items():
            d = -grads[name] if self.maximize else grads[name]
            if "weight_decay" in self.active:
                if self.decoupled_weight_decay:
                    w = (1.0 - lr[name] * weight_decay[name]) * w
                else:
                    d = decayed(d, w, weight_decay[name])
            mu = _momentum(beta1[name], momentum_decay[name], t)
            mu_next = _momentum(beta1[name], momentum_decay[name], t + 1)
            # Carried, not computed from `t`: with a schedule each factor has a beta of its own.
            p = new_state[f"mu_product.{name}"] = state[f"mu_product.{name}"] * mu
            m = new_state[f"exp_avg.{name}"] = running_mean(state[f"exp_avg.{name}"], d, beta1[name])
            v = new_state[f"exp_avg_sq.{name}"] = running_square(state[f"exp_avg_sq.{name}"], d, beta2[name])
            # PyTorch adds two quotients by the same root; here their numerators are added, which needs one.
            n = (1.0 - mu) / (1.0 - p) * d + mu_next / (1.0 - p * mu_next) * m
            root = safe_sqrt(v) / (1.0 - beta2[name] ** t) ** 0.5
            new_params[name] = descend_quotient(w, n, root + eps[name], lr[name])
        return new_params, new_state

    def _ones(self, name: str, param: Tensor, hparams: TensorDict) -> Tensor:
        # The first axis may count tasks, and all state needs it; the other axes stay 1, as one number serves them.
        shapes = [param.shape[:1] + (1,) * (param.dim() - 1)]
        for shared in (self.beta1, self.momentum_decay):
            value = resolve(shared, hparams, name, 0)
            shapes += [value.shape] if isinstance(value, Tensor) else []
        return param.new_ones(torch.broadcast_shapes(*shapes))


def _momentum(beta1: float | Tensor, momentum_decay: float | Tensor, step: int) -> float | Tensor:
    """Returns `mu(t)`, the weight of the momentum at a step that is counted from 1."""
    # The constants 0.96 and 1/2 are those of the paper, fixed in PyTorch as well.
    return beta1 * (1.0 - 0.5 * 0.96 ** (step * momentum_decay))
