"""Adam and AdamW, as `torch.optim` defines them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hypertorch.dynamics.base import GradientDynamics, zero_buffers
from hypertorch.dynamics.declared import EPS, MEAN_DECAY, SQUARE_DECAY, STEP_SIZE_EITHER_WAY, WEIGHT_DECAY, setting
from hypertorch.dynamics.elementwise import decayed, descend_quotient, running_mean, running_square, safe_sqrt
from hypertorch.dynamics.settings import Setting
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class Adam(GradientDynamics):
    """Adam, with weight decay as an L2 penalty whose slope enters the moments; every setting can be learnt.

    With `g` the gradient of the inner loss, moments `m` and `v` that are zero at first, and `t = index + 1`:

        d = g + weight_decay * w
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        w = w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    With `amsgrad` the largest `v` so far takes the place of `v` in the last line. With `decoupled_weight_decay` the
    weights decay by themselves, `w = w - lr * weight_decay * w`, and `d = g`. Where betas follow a schedule, the
    correction is that of the step's own beta, as in `torch.optim.Adam`.

    The hypergradient is finite where a gradient is exactly zero, and right where it is zero whatever the outer
    variables are: a coordinate that the loss does not use, or not yet. Where a gradient passes through zero the map
    bends within about `eps`, and hypergradients are as large as `1 / eps`; learn with an `eps` of 1e-4 or more.

    Cost: one gradient per step; state of twice the size of the parameters, with `amsgrad` three times.

    Args:
        lr: step size, at least 0.
        beta1: what the running mean of the gradient keeps at each step, in [0, 1).
        beta2: what the running mean of its square keeps at each step, in [0, 1).
        eps: added to the root in the denominator, at least 0; above 0 where a coordinate may have no gradient.
        weight_decay: factor of the parameter added to its gradient, at least 0.
        amsgrad: divide by the largest mean square so far.
        decoupled_weight_decay: let the weights decay by themselves, as in `AdamW`.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Kingma and Ba (2015), Adam, algorithm 1; Reddi, Kale and Kumar (2018), On the convergence of Adam and beyond.
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 1e-3)
    beta1: Setting = setting(MEAN_DECAY, 0.9)
    beta2: Setting = setting(SQUARE_DECAY, 0.999)
    eps: Setting = setting(EPS, 1e-8)
    weight_decay: Setting = setting(WEIGHT_DECAY, 0.0)
    amsgrad: bool = False
    decoupled_weight_decay: bool = False
    maximize: bool = False

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}`, `exp_avg_sq.{parameter}` and with `amsgrad` the largest, zero."""
        return zero_buffers(params, "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and moments after one step along `grads`."""
        lr, beta1, beta2, eps, weight_decay = self.values(params, hparams, index)
        t = index + 1
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, w in params.items():
            # The order of `torch.optim.Adam`: the sign turns before the decay, which pulls towards zero either way.
            d = -grads[name] if self.maximize else grads[name]
            if "weight_decay" in self.active:
                if self.decoupled_weight_decay:
                    w = (1.0 - lr[name] * weight_decay[name]) * w
                else:
                    d = decayed(d, w, weight_decay[name])
            m = new_state[f"exp_avg.{name}"] = running_mean(state[f"exp_avg.{name}"], d, beta1[name])
            v = new_state[f"exp_avg_sq.{name}"] = running_square(state[f"exp_avg_sq.{name}"], d, beta2[name])
            if self.amsgrad:
                # The largest of the uncorrected mean squares, as in PyTorch; the correction of the present step comes
                # after it.
                v = new_state[f"max_exp_avg_sq.{name}"] = torch.maximum(state[f"max_exp_avg_sq.{name}"], v)
            # The moments start at zero. What that takes from the mean goes into the step size, which is one number.
            # Of the square the correction goes under the root, and `eps` is added after it: PyTorch's place for it.
            root = safe_sqrt(v) / (1.0 - beta2[name] ** t) ** 0.5
            new_params[name] = descend_quotient(w, m, root + eps[name], lr[name] / (1.0 - beta1[name] ** t))
        return new_params, new_state


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamW(Adam):
    """Adam with weight decay that acts on the weights alone, not on the moments; every setting can be learnt.

    It is `Adam` with `decoupled_weight_decay`, and decays by default.

    Cost: one gradient per step; state of twice the size of the parameters, with `amsgrad` three times.

    Args:
        lr: step size, at least 0.
        beta1: what the running mean of the gradient keeps at each step, in [0, 1).
        beta2: what the running mean of its square keeps at each step, in [0, 1).
        eps: added to the root in the denominator, at least 0; above 0 where a coordinate may have no gradient.
        weight_decay: part of the parameter taken off at each step, in units of the step size, at least 0.
        amsgrad: divide by the largest mean square so far.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Loshchilov and Hutter (2019), Decoupled weight decay regularization, algorithm 2.
    """

    separate_params: ClassVar[bool] = True

    weight_decay: Setting = setting(WEIGHT_DECAY, 1e-2)
    decoupled_weight_decay: bool = field(default=True, init=False)
