"""Gradient descent with momentum in the form whose steps can be run backwards."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.constraints import Box, Constraint
from hypertorch.dynamics.factor_schedule import FactorSchedule
from hypertorch.dynamics.hyper import Setting, check_range, one_for_all, resolve
from hypertorch.dynamics.joint_entries import JointEntries, blocks_of
from hypertorch.dynamics.natural_constraints import POSITIVE, natural_constraints
from hypertorch.dynamics.reversible import ExactState, GradientFunction, ReversibleDynamics
from hypertorch.exact_arithmetic import GREATEST_FACTOR, LEAST_FACTOR, decode, encode
from hypertorch.types import TensorDict

_LEARNT_MOMENTUM = Box(lower=LEAST_FACTOR, upper=1.0 - 1e-6)


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

    lr: Setting
    momentum: Setting = 0.9

    def __post_init__(self) -> None:
        check_range("ReversibleMomentum", "lr", self.lr, 0.0, math.inf, "A step size is positive.")
        check_range(
            "ReversibleMomentum",
            "momentum",
            self.momentum,
            LEAST_FACTOR,
            GREATEST_FACTOR,
            "At 0 a step forgets the velocity and cannot be reversed, at 1 it never learns of a gradient. 0.9 is "
            "usual; for plain gradient descent take `SGD` and a backend that does not reverse.",
        )

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings that may be outer variables, by name."""
        return {"lr": self.lr, "momentum": self.momentum}

    def constraints(self) -> dict[str, Constraint]:
        """Returns lr > 0 and momentum in (0, 1), where they are learnt directly."""
        return natural_constraints(self.settings(), {"lr": POSITIVE, "momentum": _LEARNT_MOMENTUM})

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the velocities, `velocity.{parameter}`, zero."""
        return tree.with_prefix("velocity", tree.zeros_like(params))

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and velocities after one step along `grads`, in floating point."""
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, param in params.items():
            lr, momentum = resolve(self.lr, hparams, name, index), resolve(self.momentum, hparams, name, index)
            velocity = momentum * state[f"velocity.{name}"] - (1.0 - momentum) * grads[name]
            new_state[f"velocity.{name}"] = velocity
            new_params[name] = param + lr * velocity
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
        keys = {name: None if batch_dims is None else self._settings_of(name, params, hparams) for name in params}
        blocks = blocks_of(keys)
        joint = JointEntries(blocks, params, batch_dims or 0)
        factors = self.factors({name: params[name] for name in blocks}, hparams, indices)
        return ExactState(params, state, factors, joint, joint.with_prefix("velocity"))

    def _settings_of(self, name: str, params: TensorDict, hparams: TensorDict) -> Hashable:
        """Returns what params that can be held side by side have in common; None for one that cannot."""
        keys = [one_for_all(setting, name, hparams) for setting in (self.lr, self.momentum)]
        return None if None in keys else (params[name].dtype, *keys)

    @torch.no_grad()
    def step_exact(self, exact: ExactState, gradient: GradientFunction, hparams: TensorDict, index: int) -> None:
        """Takes a step on integers, in place."""
        grads = exact.join(gradient(exact.float_params()))
        for name in exact.params:
            factor = exact.factors.at(name, index)
            kick = (1.0 - factor.value) * grads[name].double()
            exact.multiply(f"velocity.{name}", factor)
            velocity = exact.buffers[f"velocity.{name}"].sub_(encode(kick))
            move = self._move(exact, name, hparams, index)
            param = exact.params[name].add_(encode(move))
            exact.watch(name, kick, velocity, move, param)

    @torch.no_grad()
    def unstep(self, exact: ExactState, gradient: GradientFunction, hparams: TensorDict, index: int) -> None:
        """Undoes the last step, in place: its operations in the opposite order, the gradient at the params before."""
        for name in exact.params:
            exact.params[name].sub_(encode(self._move(exact, name, hparams, index)))
        grads = exact.join(gradient(exact.float_params()))
        for name in exact.params:
            factor = exact.factors.at(name, index)
            exact.buffers[f"velocity.{name}"].add_(encode((1.0 - factor.value) * grads[name].double()))
            exact.divide(f"velocity.{name}", factor)

    def _move(self, exact: ExactState, name: str, hparams: TensorDict, index: int) -> Tensor:
        """Returns `lr * v`, in double precision."""
        lr = resolve(self.lr, hparams, name, index)
        return (lr.double() if isinstance(lr, Tensor) else lr) * decode(exact.buffers[f"velocity.{name}"])
