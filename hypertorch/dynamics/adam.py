"""Adam's family, as `torch.optim` defines it: Adam, AdamW, NAdam and RAdam."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch.dynamics.base import GradientDynamics, zero_buffers
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
from hypertorch.dynamics.elementwise import (
    descend,
    descend_quotient,
    descent_directions,
    running_mean,
    running_square,
    safe_sqrt,
)
from hypertorch.dynamics.settings import Setting, resolve
from hypertorch.types import TensorDict

_GROWTH = Range(0.0, math.inf, NON_NEGATIVE, "A negative one takes the momentum below 0.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments(GradientDynamics):
    """The base of Adam's family: running means `m` of the gradient and `v` of its square, and two kinds of decay.

    With `g` the gradient of the inner loss and moments that are zero at first:

        d = g + weight_decay * w        or, decoupled,   w = w - lr * weight_decay * w  and  d = g
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2

    What a subclass adds is the move, made of these.
    """

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 1e-3)
    beta1: Setting = setting(MEAN_DECAY, 0.9)
    beta2: Setting = setting(SQUARE_DECAY, 0.999)
    eps: Setting = setting(EPS, 1e-8)
    weight_decay: Setting = setting(WEIGHT_DECAY, 0.0)
    decoupled_weight_decay: bool = False
    maximize: bool = False

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`, zero."""
        return zero_buffers(params, "exp_avg", "exp_avg_sq")

    def _moments(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, settings: Sequence[Mapping[str, float | Tensor]]
    ) -> tuple[TensorDict, TensorDict, TensorDict]:
        """Returns params after a decoupled decay, the directions `d`, and the moments after a step along them."""
        lr, beta1, beta2, _, weight_decay = settings[:5]
        penalty = weight_decay if "weight_decay" in self.active else None
        if penalty is not None and self.decoupled_weight_decay:
            params = {name: (1.0 - lr[name] * penalty[name]) * w for name, w in params.items()}
            penalty = None
        directions = descent_directions(grads, params, penalty, maximize=self.maximize)
        # One after the other, in the order of `init`: a state in another order is sorted at every step.
        moments: TensorDict = {}
        for name, d in directions.items():
            moments[f"exp_avg.{name}"] = running_mean(state[f"exp_avg.{name}"], d, beta1[name])
        for name, d in directions.items():
            moments[f"exp_avg_sq.{name}"] = running_square(state[f"exp_avg_sq.{name}"], d, beta2[name])
        return params, directions, moments


@dataclass(frozen=True, kw_only=True, eq=False)
class Adam(Moments):
    """Adam, with weight decay as an L2 penalty whose slope enters the moments; every setting can be learnt.

    With `g` the gradient of the inner loss, moments `m` and `v` that are zero at first, and `t = index + 1`:

        d = g + weight_decay * w
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        w = w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    With `amsgrad` the largest `v` so far takes the place of `v` in the last line. With `decoupled_weight_decay` the
    weights decay by themselves, `w = w - lr * weight_decay * w`, and `d = g`. Where betas follow a schedule, the
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
        decoupled_weight_decay: let the weights decay by themselves, as in `AdamW`.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Kingma and Ba (2015), Adam, algorithm 1; Reddi, Kale and Kumar (2018), On the convergence of Adam and beyond.
    """

    separate_params: ClassVar[bool] = True

    amsgrad: bool = False

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}`, `exp_avg_sq.{parameter}` and with `amsgrad` the largest, zero."""
        return {**super().init(params, hparams), **(zero_buffers(params, "max_exp_avg_sq") if self.amsgrad else {})}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and moments after one step along `grads`."""
        lr, beta1, beta2, eps, _ = settings = self.values(params, hparams, index)
        params, _, new_state = self._moments(grads, params, state, settings)
        t = index + 1
        new_params: TensorDict = {}
        for name, w in params.items():
            m, v = new_state[f"exp_avg.{name}"], new_state[f"exp_avg_sq.{name}"]
            if self.amsgrad:
                # The largest of the uncorrected mean squares, as in PyTorch; the correction of the present step comes
                # after it.
                v = new_state[f"max_exp_avg_sq.{name}"] = torch.maximum(state[f"max_exp_avg_sq.{name}"], v)
            # The moments start at zero, which two factors correct. That of the mean divides the step size, which is one
            # number. That of the square goes under the root, and `eps` is added after it, as in PyTorch.
            root = safe_sqrt(v) / (1.0 - beta2[name] ** t) ** 0.5
            new_params[name] = descend_quotient(w, m, root + eps[name], lr[name] / (1.0 - beta1[name] ** t))
        return new_params, new_state


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamW(Adam):
    """Adam with weight decay that acts on the weights alone, not on the moments; every setting can be learnt.

    It is `Adam` with `decoupled_weight_decay`, and decays by default.

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

    weight_decay: Setting = setting(WEIGHT_DECAY, 1e-2)
    decoupled_weight_decay: bool = field(default=True, init=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class NAdam(Moments):
    """Adam that looks ahead along its momentum, whose weight grows over the run; every setting can be learnt.

    With `g` the gradient of the inner loss, moments `m` and `v` that are zero and a product `p` that is one at first,
    and `t = index + 1`:

        d = g + weight_decay * w
        mu(t) = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
        p = p * mu(t)
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        n = (1 - mu(t)) / (1 - p) * d + mu(t + 1) / (1 - p * mu(t + 1)) * m
        w = w - lr * n / (sqrt(v / (1 - beta2^t)) + eps)

    With `decoupled_weight_decay` the weights decay by themselves, `w = w - lr * weight_decay * w`, and `d = g`. Where
    settings follow a schedule, `mu(t + 1)` is made of the step's own values, as in `torch.optim.NAdam`.

    The hypergradient is finite where a gradient is exactly zero, and right where it is zero whatever the outer
    variables are. Where a gradient passes through zero the map bends within about `eps`, as in `Adam`.

    Cost: one gradient per step; state of twice the size of the parameters, and few numbers more.

    Args:
        lr: step size, at least 0.
        beta1: what the running mean of the gradient keeps at each step, in [0, 1).
        beta2: what the running mean of its square keeps at each step, in [0, 1).
        eps: added to the root in the denominator, at least 0; above 0 where a coordinate may have no gradient.
        weight_decay: factor of the parameter added to its gradient, at least 0.
        momentum_decay: how fast the momentum's weight grows, at least 0; at 0 it is `beta1 / 2` throughout.
        decoupled_weight_decay: let the weights decay by themselves, as in `AdamW`.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Dozat (2016), Incorporating Nesterov momentum into Adam, algorithm 2.
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = setting(STEP_SIZE_EITHER_WAY, 2e-3)
    momentum_decay: Setting = setting(_GROWTH, 4e-3)

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the moments `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`, zero, and `mu_product`, one.

        The product has one number for every entry of the parameter's first axis, which may count the tasks, and one for
        every weight only where `beta1` or `momentum_decay` has.
        """
        products = {f"mu_product.{name}": self._ones(name, param, hparams) for name, param in params.items()}
        return {**super().init(params, hparams), **products}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params, moments and products after one step along `grads`."""
        lr, beta1, beta2, eps, _, momentum_decay = settings = self.values(params, hparams, index)
        params, directions, new_state = self._moments(grads, params, state, settings)
        t = index + 1
        new_params: TensorDict = {}
        for name, w in params.items():
            m, v = new_state[f"exp_avg.{name}"], new_state[f"exp_avg_sq.{name}"]
            mu = _momentum(beta1[name], momentum_decay[name], t)
            mu_next = _momentum(beta1[name], momentum_decay[name], t + 1)
            # Carried, not computed from `t`: with a schedule each factor has a beta of its own.
            p = new_state[f"mu_product.{name}"] = state[f"mu_product.{name}"] * mu
            # PyTorch adds two quotients by the same root; here their numerators are added, which needs one.
            n = (1.0 - mu) / (1.0 - p) * directions[name] + mu_next / (1.0 - p * mu_next) * m
            root = safe_sqrt(v) / (1.0 - beta2[name] ** t) ** 0.5
            new_params[name] = descend_quotient(w, n, root + eps[name], lr[name])
        return new_params, new_state

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

    With `g` the gradient of the inner loss, moments `m` and `v` that are zero at first, and `t = index + 1`:

        d = g + weight_decay * w
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2^t / (1 - beta2^t)
        r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        w = w - lr / (1 - beta1^t) * m * (r * sqrt(1 - beta2^t) / (sqrt(v) + eps)  if rho > 5  else  1)

    With `decoupled_weight_decay` the weights decay by themselves, `w = w - lr * weight_decay * w`, and `d = g`. Note
    that `eps` is added to the root of `v` as it is, not of the corrected one as in `Adam`.

    `rho > 5` first holds at a step that depends on `beta2` alone: the sixth for 0.9 and above, never for 2/3 and below.
    At values of `beta2` where that step changes the run jumps, and there is no derivative; it is exact between them.

    The hypergradient is finite where a gradient is exactly zero, and right where it is zero whatever the outer
    variables are. Where a gradient passes through zero the map bends within about `eps`, as in `Adam`.

    Cost: one gradient per step; state of twice the size of the parameters.

    Args:
        lr: step size, at least 0.
        beta1: what the running mean of the gradient keeps at each step, in [0, 1).
        beta2: what the running mean of its square keeps at each step, in [0, 1).
        eps: added to the root in the denominator, at least 0; above 0 where a coordinate may have no gradient.
        weight_decay: factor of the parameter added to its gradient, at least 0.
        decoupled_weight_decay: let the weights decay by themselves, as in `AdamW`.
        maximize: ascend instead of descending.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a setting is of no known kind.

    References:
        Liu et al. (2020), On the variance of the adaptive learning rate and beyond, algorithm 2 (which switches at 4).
    """

    separate_params: ClassVar[bool] = True

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and moments after one step along `grads`."""
        lr, beta1, beta2, eps, _ = settings = self.values(params, hparams, index)
        params, _, new_state = self._moments(grads, params, state, settings)
        t = index + 1
        new_params: TensorDict = {}
        for name, w in params.items():
            m, v = new_state[f"exp_avg.{name}"], new_state[f"exp_avg_sq.{name}"]
            # `eps` is added to the uncorrected root, where PyTorch adds it; the correction is a part of `r`.
            step_size, root = lr[name] / (1.0 - beta1[name] ** t), safe_sqrt(v) + eps[name]
            own_beta2 = beta2[name]
            # A learnt beta is not known to the host, and a branch on it would wait for the device at every step.
            if isinstance(own_beta2, Tensor):
                trusted, r = _rectified(own_beta2, t)
                # Both are 1 where the root is not trusted: dividing by a zero that is not taken would make a NaN.
                root = torch.where(trusted, root, 1.0)
                new_params[name] = descend_quotient(w, r.to(w.dtype) * m, root, step_size)
            elif (r := _rectification(own_beta2, t)) is None:
                new_params[name] = descend(w, m, step_size)
            else:
                new_params[name] = descend_quotient(w, m, root, r * step_size)
        return new_params, new_state


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
    rho = rho_inf - 2.0 * step * beta2**step / (1.0 - beta2**step)
    trusted = rho > 5.0
    # Both are chosen before the quotient and the root: below the switch these may be 0/0 or negative, and the NaN of a
    # branch that is not taken would enter the derivative.
    above = torch.where(trusted, (rho - 4.0) * (rho - 2.0) * rho_inf * (1.0 - beta2**step), 1.0)
    below = torch.where(trusted, (rho_inf - 4.0) * (rho_inf - 2.0) * rho, 1.0)
    return trusted, (above / below).sqrt()
