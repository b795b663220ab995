"""Stochastic gradient descent with momentum, as `torch.optim.SGD` defines it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from hypertorch import tree
from hypertorch.constraints import Constraint
from hypertorch.dynamics.base import GradientDynamics
from hypertorch.dynamics.elementwise import decayed, descend
from hypertorch.dynamics.hyper import Setting, check_range, is_active, resolve
from hypertorch.dynamics.natural_constraints import DECAY, NON_NEGATIVE, POSITIVE, PROPORTION, natural_constraints
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class SGD(GradientDynamics):
    """Gradient descent with momentum, dampening, Nesterov's form and weight decay; every setting can be learnt.

    With `g` the gradient of the inner loss and the buffer `v`, zero at first (as in `torch.optim.SGD`):

        d = g + weight_decay * w
        v = momentum * v + (1 - dampening) * d
        w = w - lr * (d + momentum * v  if nesterov else  v)

    With dampening the first step is `v = d`, as in `torch.optim.SGD`, unless `dampen_first` is True. Without momentum
    there is no buffer and `w = w - lr * d`. Note that this is not the rule of Maclaurin et al. (2015), whose buffer
    carries a factor `(1 - momentum)`: that is `dampening` and `momentum` set to the same value, with `dampen_first`.

    Cost: one gradient per step; state of the size of the parameters if there is momentum, none otherwise.

    Args:
        lr: step size, at least 0.
        momentum: in [0, 1].
        dampening: in [0, 1].
        weight_decay: factor of the parameter added to its gradient, at least 0.
        nesterov: use Nesterov's form; needs momentum, and no dampening.
        maximize: ascend instead of descending.
        dampen_first: dampen the first step as all others, so that the rule is the same at every step.

    Raises:
        ValueError: if a number is out of its range, or `nesterov` is combined wrongly.
        TypeError: if a setting is of no known kind.

    References:
        Sutskever, Martens, Dahl and Hinton (2013), On the importance of initialization and momentum.
    """

    separate_params: ClassVar[bool] = True

    lr: Setting
    momentum: Setting = 0.0
    dampening: Setting = 0.0
    weight_decay: Setting = 0.0
    nesterov: bool = False
    maximize: bool = False
    dampen_first: bool = False

    def __post_init__(self) -> None:
        check_range("SGD", "lr", self.lr, 0.0, float("inf"), "A step size is positive; to ascend, pass maximize=True.")
        check_range("SGD", "momentum", self.momentum, 0.0, 1.0, "At 1 the buffer never forgets; 0.9 is usual.")
        check_range("SGD", "dampening", self.dampening, 0.0, 1.0, "It scales what enters the momentum buffer.")
        check_range(
            "SGD", "weight_decay", self.weight_decay, 0.0, float("inf"), "A negative one makes the weights explode."
        )
        if self.nesterov and (not is_active(self.momentum) or is_active(self.dampening)):
            raise ValueError(
                f"`nesterov` is True with momentum {self.momentum} and dampening {self.dampening}: Nesterov's form "
                "looks ahead along the momentum buffer, undamped. Set a momentum above 0 and leave `dampening` at 0."
            )

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings that may be outer variables, by name."""
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "dampening": self.dampening,
            "weight_decay": self.weight_decay,
        }

    def constraints(self) -> dict[str, Constraint]:
        """Returns lr > 0, weight_decay >= 0, momentum in [0, 1) and dampening in [0, 1], where learnt directly."""
        return natural_constraints(
            self.settings(),
            {"lr": POSITIVE, "momentum": DECAY, "dampening": PROPORTION, "weight_decay": NON_NEGATIVE},
        )

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the momentum buffers, `momentum.{parameter}`, zero; none without momentum."""
        return tree.with_prefix("momentum", tree.zeros_like(params)) if self._has_momentum else {}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and momentum buffers after one step along `grads`."""
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, param in params.items():
            direction = -grads[name] if self.maximize else grads[name]
            if self._has_weight_decay:
                direction = decayed(direction, param, resolve(self.weight_decay, hparams, name, index))
            if self._has_momentum:
                momentum = resolve(self.momentum, hparams, name, index)
                buffer = self._buffer(direction, state[f"momentum.{name}"], momentum, hparams, name, index)
                new_state[f"momentum.{name}"] = buffer
                direction = direction + momentum * buffer if self.nesterov else buffer
            new_params[name] = descend(param, direction, resolve(self.lr, hparams, name, index))
        return new_params, new_state

    def _buffer(
        self, direction: Tensor, buffer: Tensor, momentum: float | Tensor, hparams: TensorDict, name: str, index: int
    ) -> Tensor:
        if not self._has_dampening:
            return momentum * buffer + direction
        if index == 0 and not self.dampen_first:
            return direction
        return momentum * buffer + (1.0 - resolve(self.dampening, hparams, name, index)) * direction

    # Whether a term is there at all is asked of every parameter at every step, and schedules are long.

    @cached_property
    def _has_momentum(self) -> bool:
        return is_active(self.momentum)

    @cached_property
    def _has_dampening(self) -> bool:
        return is_active(self.dampening)

    @cached_property
    def _has_weight_decay(self) -> bool:
        return is_active(self.weight_decay)
