"""Lion, descent along the sign of an interpolated momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hypertorch import tree
from hypertorch.constraints import Constraint
from hypertorch.dynamics.base import GradientDynamics
from hypertorch.dynamics.elementwise import decayed, descend, running_mean
from hypertorch.dynamics.hyper import Setting, check_not_learnt, check_range, is_active, resolve
from hypertorch.dynamics.natural_constraints import NON_NEGATIVE, POSITIVE, natural_constraints
from hypertorch.types import TensorDict

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

    lr: Setting = 1e-4
    beta1: Setting = 0.9
    beta2: Setting = 0.99
    weight_decay: Setting = 0.0
    maximize: bool = False

    def __post_init__(self) -> None:
        check_range("Lion", "lr", self.lr, 0.0, math.inf, "A step size is positive; to ascend, pass maximize=True.")
        check_range("Lion", "beta1", self.beta1, 0.0, 1.0, "It interpolates between gradient and momentum.")
        check_range("Lion", "beta2", self.beta2, 0.0, 1.0, "It interpolates between gradient and momentum.")
        check_range(
            "Lion", "weight_decay", self.weight_decay, 0.0, math.inf, "A negative one makes the weights explode."
        )
        check_not_learnt("Lion", "beta1", self.beta1, _ONLY_A_SIGN)
        check_not_learnt("Lion", "beta2", self.beta2, _ONLY_A_SIGN)

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings by name; `lr` and `weight_decay` may be outer variables."""
        return {"lr": self.lr, "beta1": self.beta1, "beta2": self.beta2, "weight_decay": self.weight_decay}

    def constraints(self) -> dict[str, Constraint]:
        """Returns lr > 0 and weight_decay >= 0, where they are learnt directly."""
        return natural_constraints(self.settings(), {"lr": POSITIVE, "weight_decay": NON_NEGATIVE})

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the momenta, `exp_avg.{parameter}`, zero."""
        return tree.with_prefix("exp_avg", tree.zeros_like(params))

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and momenta after one step along `grads`."""
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, param in params.items():
            # Cut, so that what acts through the sign alone has no path, instead of a path with a silent zero.
            gradient, momentum = grads[name].detach(), state[f"exp_avg.{name}"].detach()
            gradient = -gradient if self.maximize else gradient
            direction = running_mean(momentum, gradient, resolve(self.beta1, hparams, name, index)).sign()
            if self._has_weight_decay:
                direction = decayed(direction, param, resolve(self.weight_decay, hparams, name, index))
            new_state[f"exp_avg.{name}"] = running_mean(momentum, gradient, resolve(self.beta2, hparams, name, index))
            new_params[name] = descend(param, direction, resolve(self.lr, hparams, name, index))
        return new_params, new_state

    @cached_property
    def _has_weight_decay(self) -> bool:
        return is_active(self.weight_decay)
