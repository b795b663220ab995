"""Adagrad, as `torch.optim.Adagrad` defines it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from hypertorch.dynamics.declared import EPS, NON_NEGATIVE, STEP_SIZE_EITHER_WAY, Range, setting
from hypertorch.dynamics.descent import Descent
from hypertorch.dynamics.elementwise import descend_quotient, safe_sqrt
from hypertorch.dynamics.settings import Setting, resolve
from hypertorch.types import TensorDict

_LR_DECAY = Range(0.0, math.inf, NON_NEGATIVE, "A negative one would turn the step around.")
_SUM = Range(0.0, math.inf, NON_NEGATIVE, "It is a sum of squares.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Adagrad(Descent):
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

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 1e-2)
    lr_decay: Setting = setting(_LR_DECAY, 0.0)
    initial_accumulator_value: Setting = setting(_SUM, 0.0, read_once=True)
    eps: Setting = setting(EPS, 1e-10)

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the sums of squares, `sum.{parameter}`, at `initial_accumulator_value`."""
        return {
            # Added to zeros instead of filled in: a learnt value keeps its path, and every entry of the sum has it.
            f"sum.{name}": torch.zeros_like(param) + resolve(self.initial_accumulator_value, hparams, name, 0)
            for name, param in params.items()
        }

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and sums of squares after one step along `grads`."""
        lr, weight_decay, lr_decay, eps = self.values(params, hparams, index)
        directions = self.directions(grads, params, weight_decay)
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, w in params.items():
            d = directions[name]
            # Not in place as in `torch.optim.Adagrad`: the sum before the step belongs to the graph.
            s = new_state[f"sum.{name}"] = torch.addcmul(state[f"sum.{name}"], d, d)
            step_size = lr[name]
            if "lr_decay" in self.active:
                # `index` and not `t`: PyTorch counts this decay from the step before, so the first step is not decayed.
                step_size = step_size / (1.0 + index * lr_decay[name])
            # The sum is zero until the first gradient comes, and there the plain root has an infinite derivative.
            new_params[name] = descend_quotient(w, d, safe_sqrt(s) + eps[name], step_size)
        return new_params, new_state
