"""Adam, as `torch.optim.Adam` defines it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hypertorch.dynamics.adam_family import AdamFamily
from hypertorch.dynamics.elementwise import decayed


@dataclass(frozen=True, kw_only=True, eq=False)
class Adam(AdamFamily):
    """Adam, with weight decay as an L2 penalty whose slope enters the moments; every setting can be learnt.

    With `g` the gradient of the inner loss, moments `m` and `v` that are zero at first, and `t = index + 1`:

        d = g + weight_decay * w
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        w = w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    With `amsgrad` the largest `v` so far takes the place of `v` in the last line. Where betas follow a schedule, the
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
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Kingma and Ba (2015), Adam, algorithm 1; Reddi, Kale and Kumar (2018), On the convergence of Adam and beyond.
    """

    separate_params: ClassVar[bool] = True

    def decay(
        self, param: Tensor, gradient: Tensor, weight_decay: float | Tensor, lr: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the parameter as it is, and `g + weight_decay * w`."""
        return param, decayed(gradient, param, weight_decay)
