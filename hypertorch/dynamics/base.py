"""What an inner optimiser is: a pure map from one inner state to the next."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.checks.argument_types import check_fields
from hypertorch.constraints import Constraint
from hypertorch.dynamics.declared import check_declared, check_settings, declared, natural_constraints
from hypertorch.dynamics.settings import Hyper, Setting, is_active, resolve
from hypertorch.types import TensorDict, TensorMapping


class Dynamics(ABC):
    """One step of the inner optimiser, `s_t = Phi_t(s_{t-1}, hparams)`, as a pure function.

    The inner state is the trained parameters and the optimiser's own buffers, both flat dictionaries of tensors.
    Leaves are frozen dataclasses of settings. A setting that may be learnt is declared once, by `setting`, with the
    range of its numbers; it may be a number, a schedule, a tensor, an outer variable (`Hyper`), or a group of these.

    Attributes:
        separate_params: whether the params that `step` returns are new tensors, none computed from another, so that the
            next gradient can be taken in them as they are. Each class says so for itself; it is not inherited.
    """

    # The safe default: the params of a rule that does not say so are viewed anew before the next gradient is taken.
    separate_params: ClassVar[bool] = False

    @abstractmethod
    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the optimiser's buffers before the first step, named freely; often zeros, often none."""

    @abstractmethod
    def step(
        self, loss: InnerLoss, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and buffers after one step.

        Args:
            loss: the inner loss with this step's data bound: `loss(params, hparams)` and
                `loss.gradient(params, hparams)`.
            params: the trained parameters.
            state: the optimiser's buffers.
            hparams: the outer variables.
            index: steps since the state was made (unit: steps, from 0).
        """

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        # A subclass may return other params than its base does, so the base cannot answer for it.
        cls.separate_params = vars(cls).get("separate_params", False)

    def __post_init__(self) -> None:
        """Checks the declared settings and the switches; a leaf with checks of its own calls it too."""
        if dataclasses.is_dataclass(self):
            check_fields(self, *(field.name for field in dataclasses.fields(self) if field.type in (bool, "bool")))
        check_declared(type(self).__name__, self._declared, declared(type(self)))

    @cached_property
    def _declared(self) -> dict[str, Setting]:
        """The declared settings by name, without those that are left out (None)."""
        declarations = declared(type(self))
        # In the order of declaration, which is the order in which `values` hands them to a rule.
        values: dict[str, Setting] = {name: getattr(self, name) for name in declarations}
        return {name: value for name, value in values.items() if value is not None or not declarations[name].optional}

    # Cached, because every step asks for it. The cache does not use `__setattr__`, which a frozen dataclass refuses.
    @cached_property
    def active(self) -> frozenset[str]:
        """Names of the declared settings that can differ from zero: a rule leaves out the terms of all others."""
        return frozenset(name for name, value in self._declared.items() if is_active(value))

    @cached_property
    def _read_at_steps(self) -> tuple[Setting, ...]:
        declarations = declared(type(self))
        return tuple(value for name, value in self._declared.items() if not declarations[name].read_once)

    def values(
        self, parameters: Iterable[str], hparams: TensorMapping, index: int
    ) -> list[Mapping[str, float | Tensor]]:
        """Returns the values of the declared settings at a step, in the order of their declarations.

        Those that are left out (None) or read once are not among them.

        Args:
            parameters: names of the inner parameters.
            hparams: the outer variables.
            index: the step (unit: steps, from 0).

        Returns:
            For each setting, its value by the name of the parameter.
        """
        values: list[Mapping[str, float | Tensor]] = []
        for setting in self._read_at_steps:
            # Most settings are numbers, and every inner step pays for a call.
            if type(setting) is float:
                values.append(dict.fromkeys(parameters, setting))
            elif isinstance(setting, Mapping) or (isinstance(setting, Hyper) and setting.per_parameter):
                values.append({name: resolve(setting, hparams, name, index) for name in parameters})
            elif isinstance(setting, Hyper):
                # Once for all params: a transform is then one operation of a step, and one of the reverse sweep.
                values.append(dict.fromkeys(parameters, setting.value(hparams, "", index)))
            else:
                values.append(dict.fromkeys(parameters, resolve(setting, hparams, "", index)))
        return values

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings by name, those of dynamics that this one holds among them."""
        return self._declared

    def init_hparams(self) -> TensorDict:
        """Returns outer variables that the dynamics itself owns, such as the weights of a learnt update rule."""
        return {}

    def constraints(self) -> dict[str, Constraint]:
        """Returns the natural constraints of learnt settings, by name or pattern of the outer variable."""
        # Of this class's own settings: dynamics that hold others ask those for theirs.
        natural = {name: declaration.allowed.natural for name, declaration in declared(type(self)).items()}
        return natural_constraints(self._declared, natural)

    def check(self, params: TensorMapping, hparams: TensorMapping, num_steps: int) -> None:
        """Raises `ValueError` if the settings do not fit a problem; called once a run, before `init`.

        Dynamics that hold others pass on to each what concerns it.

        Args:
            params: the trained parameters of one task: no tasks axis, since settings are shared by all tasks.
            hparams: the outer variables.
            num_steps: the horizon (unit: steps).
        """
        check_settings(type(self).__name__, self.settings(), params, hparams, num_steps)


class GradientDynamics(Dynamics):
    """Dynamics that see the loss through one gradient per step: a leaf writes the update rule alone."""

    @abstractmethod
    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and buffers after one step along `grads`, which has an entry for every parameter."""

    def step(
        self, loss: InnerLoss, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and buffers after one step: the gradient of the loss, then `update`."""
        return self.update(loss.gradient(params, hparams), params, state, hparams, index)


def zero_buffers(params: TensorMapping, *names: str) -> TensorDict:
    """Returns zeros called `{name}.{parameter}` of every parameter's shape, name by name."""
    return {f"{name}.{parameter}": torch.zeros_like(value) for name in names for parameter, value in params.items()}


def flattened(buffers: Mapping[str, TensorMapping]) -> TensorDict:
    """Returns `{buffer}.{parameter}` from the buffers of every parameter; a buffer's own name has no dot."""
    return {f"{name}.{parameter}": value for parameter, own in buffers.items() for name, value in own.items()}


def by_parameter(state: TensorMapping) -> dict[str, TensorDict]:
    """Returns the buffers of every parameter that has any, from `{buffer}.{parameter}`."""
    buffers: dict[str, TensorDict] = {}
    for key, value in state.items():
        # At the first dot: the name of a parameter, such as `head.weight`, has dots of its own.
        name, _, parameter = key.partition(".")
        buffers.setdefault(parameter, {})[name] = value
    return buffers
