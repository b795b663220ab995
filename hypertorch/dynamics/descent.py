"""Descent along the gradient with the slope of an L2 penalty: what most rules of `torch.optim` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hypertorch.dynamics.base import GradientDynamics
from hypertorch.dynamics.declared import STEP_SIZE_EITHER_WAY, WEIGHT_DECAY, setting
from hypertorch.dynamics.elementwise import decayed
from hypertorch.dynamics.settings import Setting
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class Descent(GradientDynamics):
    """The base of rules that move along `d = g + weight_decay * w`, with `g` the gradient of the inner loss.

    A subclass writes `update`, and gives `lr` a default if it has one.

    Args:
        lr: step size, at least 0.
        weight_decay: factor of the parameter added to its gradient, at least 0.
        maximize: ascend instead of descending.
    """

    lr: Setting = setting(STEP_SIZE_EITHER_WAY)
    weight_decay: Setting = setting(WEIGHT_DECAY, 0.0)
    maximize: bool = False

    def directions(
        self, grads: TensorDict, params: TensorDict, weight_decay: Mapping[str, float | Tensor] | None
    ) -> TensorDict:
        """Returns `d` of every parameter, with `-g` for `g` where the loss is to be maximised.

        The sign turns before the decay, which pulls towards zero either way: the order of `torch.optim`.

        Args:
            grads: `g` of every parameter.
            params: the parameters.
            weight_decay: its values at this step; None where the weights do not decay through the gradient.
        """
        if self.maximize:
            grads = {name: -g for name, g in grads.items()}
        if weight_decay is None or "weight_decay" not in self.active:
            return grads
        return {name: decayed(grads[name], w, weight_decay[name]) for name, w in params.items()}
