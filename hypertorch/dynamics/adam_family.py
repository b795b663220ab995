"""What Adam and AdamW share: running moments of the gradient, corrected for their start at zero."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.constraints import Constraint
from hypertorch.dynamics.base import GradientDynamics
from hypertorch.dynamics.elementwise import descend_quotient, running_mean, running_square, safe_sqrt
from hypertorch.dynamics.hyper import Setting, check_range, is_active, resolve
from hypertorch.dynamics.natural_constraints import DECAY, NON_NEGATIVE, POSITIVE, natural_constraints
from hypertorch.types import TensorDict

BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamFamily(GradientDynamics):
    """Descent along the mean of the gradient over the root of its mean square; leaves say how weights decay.

    With `d` the direction and `w` the weights after the leaf's `decay`, and `t = index + 1`:

        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        w = w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    With `amsgrad` the largest `v` so far takes the place of `v` in the last line. Where betas follow a schedule, the
    correction is that of the step's own beta, as in `torch.optim`.
    """

    lr: Setting = 1e-3
    beta1: Setting = 0.9
    beta2: Setting = 0.999
    eps: Setting = 1e-8
    weight_decay: Setting = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_range(owner, "lr", self.lr, 0.0, math.inf, "A step size is positive; to ascend, pass maximize=True.")
        check_range(owner, "beta1", self.beta1, 0.0, BELOW_ONE, "At 1 the mean never learns of a gradient.")
        check_range(owner, "beta2", self.beta2, 0.0, BELOW_ONE, "At 1 the mean square never learns of a gradient.")
        check_range(owner, "eps", self.eps, 0.0, math.inf, "It keeps the denominator away from 0.")
        check_range(
            owner, "weight_decay", self.weight_decay, 0.0, math.inf, "A negative one makes the weights explode."
        )

    @abstractmethod
    def decay(
        self, param: Tensor, gradient: Tensor, weight_decay: float | Tensor, lr: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the parameter and the direction that the moments see, once weight decay has acted.

        Args:
            param: the parameter.
            gradient: of the inner loss, or against it to ascend.
            weight_decay: the factor at this step.
            lr: the step size at this step.
        """

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings that may be outer variables, by name."""
        return {
            "lr": self.lr,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }

    def constraints(self) -> dict[str, Constraint]:
        """Returns lr > 0, eps and weight_decay >= 0, and betas in [0, 1), where they are learnt directly."""
        return natural_constraints(
            self.settings(),
            {"lr": POSITIVE, "beta1": DECAY, "beta2": DECAY, "eps": NON_NEGATIVE, "weight_decay": NON_NEGATIVE},
        )

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}`, `exp_avg_sq.{parameter}` and with `amsgrad` the largest, zero."""
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.amsgrad else [])]
        return {key: value for name in names for key, value in tree.with_prefix(name, tree.zeros_like(params)).items()}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and moments after one step along `grads`."""
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, param in params.items():
            direction = -grads[name] if self.maximize else grads[name]
            lr = resolve(self.lr, hparams, name, index)
            beta1, beta2 = resolve(self.beta1, hparams, name, index), resolve(self.beta2, hparams, name, index)
            if self._has_weight_decay:
                param, direction = self.decay(param, direction, resolve(self.weight_decay, hparams, name, index), lr)
            mean = running_mean(state[f"exp_avg.{name}"], direction, beta1)
            square = running_square(state[f"exp_avg_sq.{name}"], direction, beta2)
            new_state[f"exp_avg.{name}"], new_state[f"exp_avg_sq.{name}"] = mean, square
            if self.amsgrad:
                square = torch.maximum(state[f"max_exp_avg_sq.{name}"], square)
                new_state[f"max_exp_avg_sq.{name}"] = square
            root = safe_sqrt(square) / (1.0 - beta2 ** (index + 1)) ** 0.5
            step_size = lr / (1.0 - beta1 ** (index + 1))
            denominator = root + resolve(self.eps, hparams, name, index)
            new_params[name] = descend_quotient(param, mean, denominator, step_size)
        return new_params, new_state

    @cached_property
    def _has_weight_decay(self) -> bool:
        return is_active(self.weight_decay)
