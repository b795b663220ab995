"""RMSprop, as `torch.optim.RMSprop` defines it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hypertorch.dynamics.base import zero_buffers
from hypertorch.dynamics.declared import EPS, MOMENTUM, PROPORTION, STEP_SIZE_EITHER_WAY, Range, setting
from hypertorch.dynamics.descent import Descent
from hypertorch.dynamics.elementwise import descend, descend_quotient, running_mean, running_square, safe_sqrt
from hypertorch.dynamics.settings import Setting
from hypertorch.types import TensorDict

# PyTorch allows 1, at which the mean square keeps its first value; so does this range.
_ALPHA = Range(0.0, 1.0, PROPORTION, "At 1 the mean square never learns of a gradient.")


@dataclass(frozen=True, kw_only=True, eq=False)
class RMSprop(Descent):
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

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 1e-2)
    alpha: Setting = setting(_ALPHA, 0.99)
    eps: Setting = setting(EPS, 1e-8)
    momentum: Setting = setting(MOMENTUM, 0.0)
    centered: bool = False

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns `square_avg.{parameter}`, and `grad_avg` and `momentum_buffer` where they are used, zero."""
        names = ["square_avg"]
        names += ["grad_avg"] if self.centered else []
        names += ["momentum_buffer"] if "momentum" in self.active else []
        return zero_buffers(params, *names)

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and buffers after one step along `grads`."""
        lr, weight_decay, alpha, eps, momentum = self.values(params, hparams, index)
        directions = self.directions(grads, params, weight_decay)
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, w in params.items():
            d = directions[name]
            v = new_state[f"square_avg.{name}"] = running_square(state[f"square_avg.{name}"], d, alpha[name])
            if self.centered:
                a = new_state[f"grad_avg.{name}"] = running_mean(state[f"grad_avg.{name}"], d, alpha[name])
                # A difference that rounding may take below zero, which `safe_sqrt` counts as zero.
                v = v - a.square()
            root = safe_sqrt(v) + eps[name]
            if "momentum" in self.active:
                # The step size stays outside of the buffer, as in PyTorch: a schedule acts on all of the momentum at
                # once.
                b = momentum[name] * state[f"momentum_buffer.{name}"] + d / root
                new_state[f"momentum_buffer.{name}"] = b
                new_params[name] = descend(w, b, lr[name])
            else:
                new_params[name] = descend_quotient(w, d, root, lr[name])
        return new_params, new_state
