"""Gradient descent with momentum in the form whose steps can be run backwards."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch.constraints import Box
from hypertorch.dynamics.base import zero_buffers
from hypertorch.dynamics.declared import STEP_SIZE, Range, setting
from hypertorch.dynamics.elementwise import descend
from hypertorch.dynamics.reversible.base import ExactState, GradientFunction, ReversibleDynamics
from hypertorch.dynamics.reversible.exact_arithmetic import (
    GREATEST_FACTOR,
    LEAST_FACTOR,
    UNITS,
    Factor,
    add,
    subtract,
)
from hypertorch.dynamics.reversible.factor_schedule import FactorSchedule
from hypertorch.dynamics.reversible.joint_entries import JointEntries, blocks_of
from hypertorch.dynamics.settings import Hyper, Setting, own_setting, resolve
from hypertorch.types import TensorDict

_MOMENTUM = Range(
    LEAST_FACTOR,
    GREATEST_FACTOR,
    Box(lower=LEAST_FACTOR, upper=1.0 - 1e-6),
    "At 0 a step forgets the velocity and cannot be reversed, at 1 it never learns of a gradient. 0.9 is usual; for "
    "plain gradient descent take `SGD` and a backend that does not reverse.",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReversibleMomentum(ReversibleDynamics):
    """Gradient descent along a running mean of the gradient, for the backend `Reversible`; both settings can be learnt.

    With `g` the gradient of the inner loss, and the velocity `v`, zero at first (or learnt, by `LearnedBuffers`):

        v = momentum * v - (1 - momentum) * g
        w = w + lr * v

    This is the rule of Maclaurin et al. (2015) and not that of `torch.optim.SGD`, whose buffer has no factor
    `(1 - momentum)`: there, `lr * (1 - momentum)` is the step size that takes the same steps. Any backend can
    differentiate it; `Reversible` runs it on integers and back again:

        w = w - lr * v;   v = v + (1 - momentum) * g(w);   v = v / momentum

    where only the division needs help, `log2(1/momentum)` bits per weight and step: 0.15 at 0.9, 0.03 at 0.98.

    Cost: one gradient per step; state of the size of the parameters.

    Args:
        lr: step size, at least 0.
        momentum: above 0 (at least 2^-16) and below 1. A tensor of different values takes the information of its least
            value for all entries.

    Raises:
        ValueError: if a number is out of its range; (from `Reversible`) if a learnt momentum is.
        TypeError: if a setting is of no known kind.

    References:
        Maclaurin, Duvenaud and Adams (2015), Gradient-based hyperparameter optimization through reversible learning,
        algorithms 1 to 3.
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = setting(STEP_SIZE)
    momentum: Setting = setting(_MOMENTUM, 0.9)

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the velocities, `velocity.{parameter}`, zero."""
        return zero_buffers(params, "velocity")

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and velocities after one step along `grads`, in floating point."""
        lr, momentum = self.values(params, hparams, index)
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, w in params.items():
            # Algorithm 1 of the paper, in its two lines.
            v = descend(momentum[name] * state[f"velocity.{name}"], grads[name], 1.0 - momentum[name])
            new_state[f"velocity.{name}"] = v
            new_params[name] = descend(w, v, -lr[name])
        return new_params, new_state

    def factors(self, params: TensorDict, hparams: TensorDict, indices: range) -> FactorSchedule:
        """Returns the momenta of all parameters and steps."""
        return FactorSchedule("`momentum` of `ReversibleMomentum`", self.momentum, params, hparams, indices)

    def start_exact(
        self,
        params: TensorDict,
        state: TensorDict,
        hparams: TensorDict,
        indices: range,
        *,
        batch_dims: int | None = None,
    ) -> ExactState:
        """Returns params and velocities in integers; those with the same settings side by side, if asked for."""
        # The rule acts elementwise, so params with equal settings can be one tensor.
        keys = {name: None if batch_dims is None else self._settings_of(name, params, hparams) for name in params}
        blocks = blocks_of(keys)
        joint = JointEntries(blocks, params, batch_dims or 0)
        factors = self.factors({name: params[name] for name in blocks}, hparams, indices)
        return ExactState(params, state, factors, joint, joint.with_prefix("velocity"))

    def _settings_of(self, name: str, params: TensorDict, hparams: TensorDict) -> Hashable:
        """Returns what params that can be held side by side have in common; None for one that cannot."""
        keys = [_shared_value(setting, name, hparams) for setting in (self.lr, self.momentum)]
        return None if None in keys else (params[name].dtype, *keys)

    @torch.no_grad()
    def step_exact(self, exact: ExactState, gradient: GradientFunction, hparams: TensorDict, index: int) -> None:
        """Takes a step on integers, in place."""
        grads = gradient(exact.float_params())
        for name in exact.params:
            factor = exact.factors.at(name, index)
            kick = self._kick(grads[name], factor)
            # Before the gradient is added: the step back subtracts the gradient first and divides after that.
            exact.multiply(f"velocity.{name}", factor)
            velocity = add(exact.buffers[f"velocity.{name}"], kick)
            # Of the new velocity, which is still there when the step back begins.
            move = self._move(velocity, name, hparams, index)
            param = add(exact.params[name], move)
            # What is added is watched as well as the sums: a sum that has wrapped around may look small.
            exact.watch(name, kick, velocity, move, param)

    @torch.no_grad()
    def unstep(self, exact: ExactState, gradient: GradientFunction, hparams: TensorDict, index: int) -> None:
        """Undoes the last step, in place: its operations in the opposite order, the gradient at the params before."""
        for name in exact.params:
            subtract(exact.params[name], self._move(exact.buffers[f"velocity.{name}"], name, hparams, index))
        # At the params before the step, which are exact again: the gradient has the same bits as on the way there.
        grads = gradient(exact.float_params())
        for name in exact.params:
            factor = exact.factors.at(name, index)
            subtract(exact.buffers[f"velocity.{name}"], self._kick(grads[name], factor))
            exact.divide(f"velocity.{name}", factor)

    def _kick(self, grad: Tensor, factor: Factor) -> Tensor:
        """Returns `-(1 - momentum) * g` in units of `2^-52`, in double precision."""
        # By the factor's own value: the step back must compute the very same bits. Units are a power of two, so they
        # change none. In place, as fresh memory costs more than the product.
        return grad.to(torch.float64, copy=True).mul_((factor.value - 1.0) * UNITS)

    def _move(self, velocity: Tensor, name: str, hparams: TensorDict, index: int) -> Tensor:
        """Returns `lr * v` of integers, in their units, in double precision."""
        lr = resolve(self.lr, hparams, name, index)
        return velocity.double().mul_(lr.double() if isinstance(lr, Tensor) else lr)


def _shared_value(setting: Setting, parameter: str, hparams: TensorDict) -> Hashable:
    """Returns a key that parameters with the same value of a setting share; None if the value is for one alone.

    A value of its own by the parameter's name, or a tensor of several values, is for one parameter alone.
    """
    own = own_setting(setting, parameter)
    if isinstance(own, Hyper) and own.per_parameter:
        return None
    # At step 0, for its axes alone, which are the same at every step.
    value = resolve(own, hparams, parameter, 0)
    return None if isinstance(value, Tensor) and value.dim() else id(own)
