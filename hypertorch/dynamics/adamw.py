"""AdamW, as `torch.optim.AdamW` defines it: Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hypertorch.dynamics.adam_family import AdamFamily
from hypertorch.dynamics.hyper import Setting


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamW(AdamFamily):
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

    weight_decay: Setting = 1e-2

    def decay(
        self, param: Tensor, gradient: Tensor, weight_decay: float | Tensor, lr: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns `(1 - lr * weight_decay) * w`, and the gradient as it is."""
        return (1.0 - lr * weight_decay) * param, gradient
