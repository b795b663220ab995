"""AdamW, as `torch.optim.AdamW` defines it: Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hypertorch.dynamics.base import GradientDynamics, zero_buffers
from hypertorch.dynamics.declared import EPS, MEAN_DECAY, SQUARE_DECAY, STEP_SIZE_EITHER_WAY, WEIGHT_DECAY, setting
from hypertorch.dynamics.elementwise import descend_quotient, running_mean, running_square, safe_sqrt
from hypertorch.dynamics.settings import Setting
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamW(GradientDynamics):
    """Adam with weight decay that acts on the weights alone, not on the moments; every setting can be learnt.

    With `g` the gradient of the inner loss, moments `m` and `v` that are zero at first, and `t = index + 1`:

        w = w - lr * weight_decay * w
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        w = w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    All else is as in `Adam`, derivatives at zero gradients included.

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

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 1e-3)
    beta1: Setting = setting(MEAN_DECAY, 0.9)
    beta2: Setting = setting(SQUARE_DECAY, 0.999)
    eps: Setting = setting(EPS, 1e-8)
    weight_decay: Setting = setting(WEIGHT_DECAY, 1e-2)
    amsgrad: bool = False
    maximize: bool = False

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments, named as those of `Adam`, zero."""
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
            g = -grads[name] if self.maximize else grads[name]
            if "weight_decay" in self.active:
                # The one difference to Adam: the decay acts on the weights, and no moment sees it.
                w = (1.0 - lr[name] * weight_decay[name]) * w
            m = new_state[f"exp_avg.{name}"] = running_mean(state[f"exp_avg.{name}"], g, beta1[name])
            v = new_state[f"exp_avg_sq.{name}"] = running_square(state[f"exp_avg_sq.{name}"], g, beta2[name])
            if self.amsgrad:
                # Before the bias correction, as in `Adam`.
                v = new_state[f"max_exp_avg_sq.{name}"] = torch.maximum(state[f"max_exp_avg_sq.{name}"], v)
            # As in `Adam`: the correction of the square goes under the root, and `eps` is added after it.
            root = safe_sqrt(v) / (1.0 - beta2[name] ** t) ** 0.5
            new_params[name] = descend_quotient(w, m, root + eps[name], lr[name] / (1.0 - beta1[name] ** t))
        return new_params, new_state
