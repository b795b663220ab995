"""Lion, descent along the sign of an interpolated momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hypertorch.dynamics.base import GradientDynamics, zero_buffers
from hypertorch.dynamics.declared import STEP_SIZE_EITHER_WAY, WEIGHT_DECAY, Range, setting
from hypertorch.dynamics.elementwise import decayed, descend, running_mean
from hypertorch.dynamics.settings import Setting
from hypertorch.types import TensorDict

_SHARE = Range(0.0, 1.0, None, "It interpolates between gradient and momentum.")
_ONLY_A_SIGN = "it acts through the sign of the interpolated momentum alone, which is constant between jumps"


@dataclass(frozen=True, kw_only=True, eq=False)
class Lion(GradientDynamics):
    """Descent along the sign of an interpolation between momentum and gradient, with decoupled weight decay.

    With `g` the gradient of the inner loss and the momentum `m`, zero at first:

        c = beta1 * m + (1 - beta1) * g
        w = w - lr * (sign(c) + weight_decay * w)
        m = beta2 * m + (1 - beta2) * g

    **Nothing has a hypergradient through a gradient here**: the sign is constant between jumps. `lr`, `weight_decay`
    and a learnt initialisation have theirs, exact wherever no entry of `c` is zero. A hyperparameter that acts through
    the inner loss alone has no path and is refused as detached; one that the outer loss reads too keeps its direct
    term, which is all there is. A learnt `beta1` or `beta2` is refused. To learn any of these, use a rule that is
    continuous in the gradient, such as `AdamW`.

    `sign(0)` is 0: a coordinate without a gradient so far does not move, but decays.

    Cost: one gradient per step; state of the size of the parameters.

    Args:
        lr: step size, at least 0.
        beta1: weight of the momentum inside the sign, in [0, 1]; it cannot be learnt.
        beta2: what the momentum keeps at each step, in [0, 1]; it cannot be learnt.
        weight_decay: part of the parameter taken off at each step, in units of the step size, at least 0.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range, or `beta1` or `beta2` is a `Hyper`.
        TypeError: if a setting is of no known kind.

    References:
        Chen et al. (2023), Symbolic discovery of optimization algorithms, algorithm 2.
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 1e-4)
    beta1: Setting = setting(_SHARE, 0.9, never_learnt=_ONLY_A_SIGN)
    beta2: Setting = setting(_SHARE, 0.99, never_learnt=_ONLY_A_SIGN)
    weight_decay: Setting = setting(WEIGHT_DECAY, 0.0)
    maximize: bool = False

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the momenta, `exp_avg.{parameter}`, zero."""
        return zero_buffers(params, "exp_avg")

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and momenta after one step along `grads`."""
        lr, beta1, beta2, weight_decay = self.values(params, hparams, index)
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, w in params.items():
            # Cut, so that what acts through the sign alone has no path, instead of a path with a silent zero.
            g, m = grads[name].detach(), state[f"exp_avg.{name}"].detach()
            g = -g if self.maximize else g
            # The momentum before this step, as in the paper: it is updated, by the other beta, after it has been read.
            direction = running_mean(m, g, beta1[name]).sign()
            if "weight_decay" in self.active:
                # Added after the sign, inside of which it would have no effect: the decay is decoupled.
                direction = decayed(direction, w, weight_decay[name])
            # Along the gradient alone: the decay never enters the momentum.
            new_state[f"exp_avg.{name}"] = running_mean(m, g, beta2[name])
            new_params[name] = descend(w, direction, lr[name])
        return new_params, new_state
