"""Adam's family, as `torch.optim` defines it: Adam, AdamW, NAdam and RAdam."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch.dynamics.base import zero_buffers
from hypertorch.dynamics.declared import (
    EPS,
    MEAN_DECAY,
    NON_NEGATIVE,
    SQUARE_DECAY,
    STEP_SIZE_EITHER_WAY,
    WEIGHT_DECAY,
    Range,
    setting,
)
from hypertorch.dynamics.descent import Descent
from hypertorch.dynamics.elementwise import descend, descend_quotient, power, running_mean, running_square, safe_sqrt
from hypertorch.dynamics.settings import Setting, resolve
from hypertorch.types import TensorDict

_GROWTH = Range(0.0, math.inf, NON_NEGATIVE, "A negative one takes the momentum below 0.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments(Descent):
    """The base of Adam's family: running means `m` of the gradient and `v` of its square, and two kinds of decay.

    With `g` the gradient of the inner loss and moments that are zero at first:

        d = g + weight_decay * w        or, decoupled,   w = w - lr * weight_decay * w  and  d = g
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2

    What a subclass adds is the move, made of these and of `t = index + 1`.

    The hypergradient is finite where a gradient is exactly zero, and right where it is zero whatever the outer
    variables are: a coordinate that the loss does not use, or not yet. Where a gradient passes through zero the map
    bends within about `eps`, and hypergradients are as large as `1 / eps`; learn with an `eps` of 1e-4 or more.
    """

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 1e-3)
    beta1: Setting = setting(MEAN_DECAY, 0.9)
    beta2: Setting = setting(SQUARE_DECAY, 0.999)
    eps: Setting = setting(EPS, 1e-8)
    decoupled_weight_decay: bool = False

    @property
    def _carried(self) -> tuple[str, ...]:
        """Names of the buffers that the rule carries beside the moments."""
        return ()

    @abstractmethod
    def _move(
        self, w: Tensor, d: Tensor, m: Tensor, v: Tensor, own: TensorDict, settings: Sequence[float | Tensor], t: int
    ) -> tuple[Tensor, TensorDict]:
        """Returns one parameter after a step, and what the rule carries for it.

        Args:
            w: the parameter, after a decoupled decay.
            d: the direction.
            m: the running mean of the directions, this one included.
            v: that of their squares.
            own: the buffers that the rule carries, as the step before left them.
            settings: the parameter's own, in the order of their declarations.
            t: steps with this one.
        """

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`, and what is carried, zero."""
        return zero_buffers(params, "exp_avg", "exp_avg_sq", *self._carried)

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and moments after one step along `grads`."""
        settings = self.values(params, hparams, index)
        lr, weight_decay, beta1, beta2 = settings[:4]
        if self.decoupled_weight_decay and "weight_decay" in self.active:
            params = {name: (1.0 - lr[name] * weight_decay[name]) * w for name, w in params.items()}
        directions = self.directions(grads, params, None if self.decoupled_weight_decay else weight_decay)
        # One after the other, in the order of `init`: a state in another order is sorted at every step.
        new_state: TensorDict = {}
        for name, d in directions.items():
            new_state[f"exp_avg.{name}"] = running_mean(state[f"exp_avg.{name}"], d, beta1[name])
        for name, d in directions.items():
            new_state[f"exp_avg_sq.{name}"] = running_square(state[f"exp_avg_sq.{name}"], d, beta2[name])
        new_params: TensorDict = {}
        for name, w in params.items():
            m, v = new_state[f"exp_avg.{name}"], new_state[f"exp_avg_sq.{name}"]
            own = {buffer: state[f"{buffer}.{name}"] for buffer in self._carried}
            own_settings = [values[name] for values in settings]
            new_params[name], new_own = self._move(w, directions[name], m, v, own, own_settings, index + 1)
            new_state |= {f"{buffer}.{name}": value for buffer, value in new_own.items()}
        return new_params, new_state


@dataclass(frozen=True, kw_only=True, eq=False)
class Adam(Moments):
    """Adam, with weight decay as an L2 penalty whose slope enters the moments; every setting can be learnt.

    With the moments `m` and `v` of `Moments`, and `t = index + 1`:

        w = w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    With `amsgrad` the largest `v` so far takes the place of `v`. Where betas follow a schedule, the correction is that
    of the step's own beta, as in `torch.optim.Adam`.

    Cost: one gradient per step; state of twice the size of the parameters, with `amsgrad` three times.

    Args:
        lr: step size, at least 0.
        beta1: what the running mean of the gradient keeps at each step, in [0, 1).
        beta2: what the running mean of its square keeps at each step, in [0, 1).
        eps: added to the root in the denominator, at least 0; above 0 where a coordinate may have no gradient.
        weight_decay: factor of the parameter added to its gradient, at least 0.
        decoupled_weight_decay: let the weights decay by themselves, as in `AdamW`.
        maximize: ascend instead of descending.
        amsgrad: divide by the largest mean square so far.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Kingma and Ba (2015), Adam, algorithm 1; Reddi, Kale and Kumar (2018), On the convergence of Adam and beyond.
    """

    separate_params: ClassVar[bool] = True

    amsgrad: bool = False

    @property
    def _carried(self) -> tuple[str, ...]:
        """The largest mean square so far, with `amsgrad`."""
        return ("max_exp_avg_sq",) if self.amsgrad else ()

    def _move(
        self, w: Tensor, d: Tensor, m: Tensor, v: Tensor, own: TensorDict, settings: Sequence[float | Tensor], t: int
    ) -> tuple[Tensor, TensorDict]:
        """Returns one parameter after a step, and its largest mean square."""
        lr, _, beta1, beta2, eps = settings
        if self.amsgrad:
            # The largest of the uncorrected mean squares, as in PyTorch; the correction of the present step comes
            # after it.
            v = torch.maximum(own["max_exp_avg_sq"], v)
            own = {"max_exp_avg_sq": v}
        # The moments start at zero, which two factors correct. That of the mean divides the step size, which is one
        # number. That of the square goes under the root, and `eps` is added after it, as in PyTorch.
        root = safe_sqrt(v) / (1.0 - power(beta2, t)) ** 0.5
        return descend_quotient(w, m, root + eps, lr / (1.0 - power(beta1, t))), own


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamW(Adam):
    """Adam with weight decay that acts on the weights alone, not on the moments; every setting can be learnt.

    It is `Adam` with `decoupled_weight_decay`, and decays by default. Settings that are not named here are those of
    `Adam`.

    Args:
        weight_decay: part of the parameter taken off at each step, in units of the step size, at least 0.

    References:
        Loshchilov and Hutter (2019), Decoupled weight decay regularization, algorithm 2.
    """

    separate_params: ClassVar[bool] = True

    weight_decay: Setting = setting(WEIGHT_DECAY, 1e-2)
    decoupled_weight_decay: bool = field(default=True, init=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class NAdam(Moments):
    """Adam that looks ahead along its momentum, whose weight grows over the run; every setting can be learnt.

    With the moments `m` and `v` and the direction `d` of `Moments`, a product `p` that is one at first, and
    `t = index + 1`:

        mu(t) = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
        p = p * mu(t)
        n = (1 - mu(t)) / (1 - p) * d + mu(t + 1) / (1 - p * mu(t + 1)) * m
        w = w - lr * n / (sqrt(v / (1 - beta2^t)) + eps)

    Where settings follow a schedule, `mu(t + 1)` is made of the step's own values, as in `torch.optim.NAdam`. Settings
    that are not named here are those of `Adam`; there is no `amsgrad`.

    Cost: one gradient per step; state of twice the size of the parameters, and few numbers more.

    Args:
        momentum_decay: how fast the momentum's weight grows, at least 0; at 0 it is `beta1 / 2` throughout.

    References:
        Dozat (2016), Incorporating Nesterov momentum into Adam, algorithm 2.
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 2e-3)
    momentum_decay: Setting = setting(_GROWTH, 4e-3)

    @property
    def _carried(self) -> tuple[str, ...]:
        """The product `p`."""
        return ("mu_product",)

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`, zero, and `mu_product`, one.

        The product has one number for every entry of the parameter's first axis, which may count the tasks, and one for
        every weight only where `beta1` or `momentum_decay` has.
        """
        products = {f"mu_product.{name}": self._ones(name, param, hparams) for name, param in params.items()}
        return {**super().init(params, hparams), **products}

    def _move(
        self, w: Tensor, d: Tensor, m: Tensor, v: Tensor, own: TensorDict, settings: Sequence[float | Tensor], t: int
    ) -> tuple[Tensor, TensorDict]:
        """Returns one parameter after a step, and its product."""
        lr, _, beta1, beta2, eps, momentum_decay = settings
        mu, mu_next = _momentum(beta1, momentum_decay, t), _momentum(beta1, momentum_decay, t + 1)
        # Carried, not computed from `t`: with a schedule each factor has a beta of its own.
        p = own["mu_product"] * mu
        # PyTorch adds two quotients by the same root; here their numerators are added, which needs one.
        n = (1.0 - mu) / (1.0 - p) * d + mu_next / (1.0 - p * mu_next) * m
        root = safe_sqrt(v) / (1.0 - power(beta2, t)) ** 0.5
        return descend_quotient(w, n, root + eps, lr), {"mu_product": p}

    def _ones(self, name: str, param: Tensor, hparams: TensorDict) -> Tensor:
        # The first axis may count tasks, and all state needs it; the other axes stay 1, as one number serves them.
        shapes = [param.shape[:1] + (1,) * (param.dim() - 1)]
        for shared in (self.beta1, self.momentum_decay):
            value = resolve(shared, hparams, name, 0)
            shapes += [value.shape] if isinstance(value, Tensor) else []
        return param.new_ones(torch.broadcast_shapes(*shapes))


@dataclass(frozen=True, kw_only=True, eq=False)
class RAdam(Moments):
    """Adam that moves by its momentum alone until the mean square can be trusted; every setting can be learnt.

    With the moments `m` and `v` of `Moments`, and `t = index + 1`:

        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2^t / (1 - beta2^t)
        r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        w = w - lr / (1 - beta1^t) * m * (r * sqrt(1 - beta2^t) / (sqrt(v) + eps)  if rho > 5  else  1)

    Note that `eps` is added to the root of `v` as it is, not of the corrected one as in `Adam`. The settings are those
    of `Adam`; there is no `amsgrad`.

    `rho > 5` first holds at a step that depends on `beta2` alone: the sixth for 0.9 and above, never for 2/3 and below.
    At values of `beta2` where that step changes the run jumps, and there is no derivative; it is exact between them.

    Cost: one gradient per step; state of twice the size of the parameters.

    References:
        Liu et al. (2020), On the variance of the adaptive learning rate and beyond, algorithm 2 (which switches at 4).
    """

    separate_params: ClassVar[bool] = True

    def _move(
        self, w: Tensor, d: Tensor, m: Tensor, v: Tensor, own: TensorDict, settings: Sequence[float | Tensor], t: int
    ) -> tuple[Tensor, TensorDict]:
        """Returns one parameter after a step; nothing is carried."""
        lr, _, beta1, beta2, eps = settings
        # `eps` is added to the uncorrected root, where PyTorch adds it; the correction is a part of `r`.
        step_size, root = lr / (1.0 - power(beta1, t)), safe_sqrt(v) + eps
        # A learnt beta is not known to the host, and a branch on it would wait for the device at every step. In a
        # compiled loop the index is a tensor, too.
        if isinstance(beta2, Tensor) or isinstance(t, Tensor):
            if not isinstance(beta2, Tensor):
                beta2 = torch.full((), beta2, dtype=torch.float64, device=w.device)
            trusted, r = _rectified(beta2, t)
            # Both are 1 where the root is not trusted: dividing by a zero that is not taken would make a NaN.
            root = torch.where(trusted, root, 1.0)
            return descend_quotient(w, r.to(w.dtype) * m, root, step_size), own
        r = _rectification(beta2, t)
        return (descend(w, m, step_size) if r is None else descend_quotient(w, m, root, r * step_size)), own


def _momentum(beta1: float | Tensor, momentum_decay: float | Tensor, step: int) -> float | Tensor:
    """Returns `mu(t)`, the weight of the momentum at a step that is counted from 1."""
    # The constants 0.96 and 1/2 are those of the paper, fixed in PyTorch as well.
    return beta1 * (1.0 - 0.5 * 0.96 ** (step * momentum_decay))


def _rectification(beta2: float, step: int) -> float | None:
    """Returns `r * sqrt(1 - beta2^t)` at a step that is counted from 1; None while `rho` is 5 or less."""
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * beta2**step / (1.0 - beta2**step)
    # 5 is PyTorch's threshold; the paper has 4.
    if rho <= 5.0:
        return None
    square = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    return (square * (1.0 - beta2**step)) ** 0.5


def _rectified(beta2: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Returns whether `rho` is above 5, and `r * sqrt(1 - beta2^t)` where it is, 1 elsewhere; in double precision.

    In single precision the difference of two large numbers that `rho` is would put the switch at a wrong step.
    """
    beta2 = beta2.double()
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * power(beta2, step) / (1.0 - power(beta2, step))
    trusted = rho > 5.0
    # Both are chosen before the quotient and the root: below the switch these may be 0/0 or negative, and the NaN of a
    # branch that is not taken would enter the derivative.
    above = torch.where(trusted, (rho - 4.0) * (rho - 2.0) * rho_inf * (1.0 - power(beta2, step)), 1.0)
    below = torch.where(trusted, (rho_inf - 4.0) * (rho_inf - 2.0) * rho, 1.0)
    return trusted, (above / below).sqrt()
