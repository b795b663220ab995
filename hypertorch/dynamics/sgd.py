"""Stochastic gradient descent with momentum, as `torch.optim.SGD` defines it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hypertorch.dynamics.base import zero_buffers
from hypertorch.dynamics.declared import MOMENTUM, PROPORTION, Range, setting
from hypertorch.dynamics.descent import Descent
from hypertorch.dynamics.elementwise import descend
from hypertorch.dynamics.settings import Setting
from hypertorch.types import TensorDict

_DAMPENING = Range(0.0, 1.0, PROPORTION, "It scales what enters the momentum buffer.")


@dataclass(frozen=True, kw_only=True, eq=False)
class SGD(Descent):
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

    momentum: Setting = setting(MOMENTUM, 0.0)
    dampening: Setting = setting(_DAMPENING, 0.0)
    nesterov: bool = False
    dampen_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and ("momentum" not in self.active or "dampening" in self.active):
            raise ValueError(
                f"`nesterov` is True with momentum {self.momentum} and dampening {self.dampening}: Nesterov's form "
                "looks ahead along the momentum buffer, undamped. Set a momentum above 0 and leave `dampening` at 0."
            )

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the momentum buffers, `momentum.{parameter}`, zero; none without momentum."""
        return zero_buffers(params, "momentum") if "momentum" in self.active else {}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and momentum buffers after one step along `grads`."""
        lr, weight_decay, momentum, dampening = self.values(params, hparams, index)
        # Most runs have neither, and every inner step pays for a call.
        if self.maximize or "weight_decay" in self.active:
            grads = self.directions(grads, params, weight_decay)
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, w in params.items():
            d = grads[name]
            if "momentum" in self.active:
                if "dampening" not in self.active:
                    # The first step too: the buffer is zero then, or learnt.
                    v = momentum[name] * state[f"momentum.{name}"] + d
                elif isinstance(index, Tensor) and not self.dampen_first:
                    # Where the loop over steps is in a program: by a factor and not by a branch.
                    v = d + (momentum[name] * state[f"momentum.{name}"] - dampening[name] * d) * (index != 0)
                # PyTorch's buffer starts as the first direction itself; with dampening that is not what a buffer of
                # zeros gives.
                elif index == 0 and not self.dampen_first:
                    v = d
                else:
                    v = momentum[name] * state[f"momentum.{name}"] + (1.0 - dampening[name]) * d
                new_state[f"momentum.{name}"] = v
                d = d + momentum[name] * v if self.nesterov else v
            new_params[name] = descend(w, d, lr[name])
        return new_params, new_state
