"""RAdam, as `torch.optim.RAdam` defines it: Adam with a rectified step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch.dynamics.base import GradientDynamics, zero_buffers
from hypertorch.dynamics.declared import EPS, MEAN_DECAY, SQUARE_DECAY, STEP_SIZE_EITHER_WAY, WEIGHT_DECAY, setting
from hypertorch.dynamics.elementwise import (
    decayed,
    descend,
    descend_quotient,
    running_mean,
    running_square,
    safe_sqrt,
)
from hypertorch.dynamics.settings import Setting
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class RAdam(GradientDynamics):
    """Adam that moves by its momentum alone until the mean square can be trusted; every setting can be learnt.

    With `g` the gradient of the inner loss, moments `m` and `v` that are zero at first, and `t = index + 1`:

        d = g + weight_decay * w
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2^t / (1 - beta2^t)
        r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        w = w - lr / (1 - beta1^t) * m * (r * sqrt(1 - beta2^t) / (sqrt(v) + eps)  if rho > 5  else  1)

    With `decoupled_weight_decay` the weights decay by themselves, `w = w - lr * weight_decay * w`, and `d = g`. Note
    that `eps` is added to the root of `v` as it is, not of the corrected one as in `Adam`.

    `rho > 5` first holds at a step that depends on `beta2` alone: the sixth for 0.9 and above, never for 2/3 and below.
    At values of `beta2` where that step changes the run jumps, and there is no derivative; it is exact between them.

    The hypergradient is finite where a gradient is exactly zero, and right where it is zero whatever the outer
    variables are. Where a gradient passes through zero the map bends within about `eps`, as in `Adam`.

    Cost: one gradient per step; state of twice the size of the parameters.

    Args:
        lr: step size, at least 0.
        beta1: what the running mean of the gradient keeps at each step, in [0, 1).
        beta2: what the running mean of its square keeps at each step, in [0, 1).
        eps: added to the root in the denominator, at least 0; above 0 where a coordinate may have no gradient.
        weight_decay: factor of the parameter added to its gradient, at least 0.
        decoupled_weight_decay: let the weights decay by themselves, as in `AdamW`.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Liu et al. (2020), On the variance of the adaptive learning rate and beyond, algorithm 2 (which switches at 4).
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 1e-3)
    beta1: Setting = setting(MEAN_DECAY, 0.9)
    beta2: Setting = setting(SQUARE_DECAY, 0.999)
    eps: Setting = setting(EPS, 1e-8)
    weight_decay: Setting = setting(WEIGHT_DECAY, 0.0)
    decoupled_weight_decay: bool = False
    maximize: bool = False

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`, zero."""
        return zero_buffers(params, "exp_avg", "exp_avg_sq")

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and moments after one step along `grads`."""
        lr, beta1, beta2, eps, weight_decay = self.values(params, hparams, index)
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
            m = new_state[f"exp_avg.{name}"] = running_mean(state[f"exp_avg.{name}"], d, beta1[name])
            v = new_state[f"exp_avg_sq.{name}"] = running_square(state[f"exp_avg_sq.{name}"], d, beta2[name])
            # `eps` is added to the uncorrected root, where PyTorch adds it; the correction is a part of `r`.
            step_size, root = lr[name] / (1.0 - beta1[name] ** t), safe_sqrt(v) + eps[name]
            own_beta2 = beta2[name]
            # A learnt beta is not known to the host, and a branch on it would wait for the device at every step.
            if isinstance(own_beta2, Tensor):
                trusted, r = _rectified(own_beta2, t)
                # Both are 1 where the root is not trusted: dividing by a zero that is not taken would make a NaN.
                root = torch.where(trusted, root, 1.0)
                new_params[name] = descend_quotient(w, r.to(w.dtype) * m, root, step_size)
            elif (r := _rectification(own_beta2, t)) is None:
                new_params[name] = descend(w, m, step_size)
            else:
                new_params[name] = descend_quotient(w, m, root, r * step_size)
        return new_params, new_state


def _rectification(beta2: float, step: int) -> float | None:
    """Returns `r * sqrt(1 - beta2^t)` at a step that is counted from 1; None while `rho` is 5 or less."""
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * beta2**step / (1.0 - beta2**step)
    # 5 is PyTorch's threshold; the paper has 4.
    if rho <= 5.0:
        return None
    square = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    return (square * (1.0 - beta2**step)) ** 0.5


def _rectified(beta2: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Returns whether `rho` is above 5, and `r * sqrt(1 - beta2^t)` where it is, 1 elsewhere; in double precision.

    In single precision the difference of two large numbers that `rho` is would put the switch at a wrong step.
    """
    beta2 = beta2.double()
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * beta2**step / (1.0 - beta2**step)
    trusted = rho > 5.0
    # Both are chosen before the quotient and the root: below the switch these may be 0/0 or negative, and the NaN of a
    # branch that is not taken would enter the derivative.
    above = torch.where(trusted, (rho - 4.0) * (rho - 2.0) * rho_inf * (1.0 - beta2**step), 1.0)
    below = torch.where(trusted, (rho_inf - 4.0) * (rho_inf - 2.0) * rho, 1.0)
    return trusted, (above / below).sqrt()
