"""What a reversible inner optimiser is: one whose steps can be run backwards, bit for bit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hypertorch.dynamics.base import Dynamics, GradientDynamics
from hypertorch.dynamics.learned_buffers import LearnedBuffers
from hypertorch.dynamics.reversible.exact_arithmetic import (
    LARGEST_NUMBER,
    UNITS,
    Factor,
    InformationBuffer,
    decode,
    encode,
    largest,
)
from hypertorch.dynamics.reversible.factor_schedule import FactorSchedule
from hypertorch.dynamics.reversible.joint_entries import JointEntries
from hypertorch.types import TensorDict, TensorMapping

GradientFunction: TypeAlias = Callable[[TensorDict], TensorDict]
"""From params to the gradient of the inner loss, both in the blocks of an `ExactState`.

The same params must give the same bits, whenever it is called.
"""


class ExactState:
    """An inner state in integers, with all that is needed to go back to where it came from.

    Attributes:
        params: the params, int64, in units of `2^-52`.
        buffers: the optimiser's buffers, likewise.
        information: what products have forgotten, by the name of the buffer that was multiplied.
        factors: what buffers are multiplied by.
        largest: for every block of params, the largest magnitude that was seen in it, its buffers, or what was added
            to either, a scalar on the device, in units of `2^-52`; NaN if there was one.
        joint_params: which params are held side by side.
        joint_buffers: which buffers are.

    A state holds blocks: params that the rule treats alike side by side, under the name of the first. `joint_params`
    and `joint_buffers` make entries of them, under the names of the problem.

    Args:
        params: the params before the first step.
        buffers: the optimiser's buffers before the first step.
        factors: what buffers are multiplied by, for every block.
        joint_params: which params are held side by side.
        joint_buffers: which buffers are.
    """

    def __init__(
        self,
        params: TensorMapping,
        buffers: TensorMapping,
        factors: FactorSchedule,
        joint_params: JointEntries,
        joint_buffers: JointEntries,
    ) -> None:
        self.joint_params, self.joint_buffers = joint_params, joint_buffers
        params, buffers = joint_params.join(params), joint_buffers.join(buffers)
        # Integers from here on. The params as floats are made of them for each gradient, forwards and backwards alike.
        self.params = {name: encode(value) for name, value in params.items()}
        self.buffers = {name: encode(value) for name, value in buffers.items()}
        self.information = {name: InformationBuffer(value) for name, value in self.buffers.items()}
        self.factors = factors
        self.largest: TensorDict = {}
        self._dtypes = {name: value.dtype for name, value in params.items()}
        self._buffer_dtypes = {name: value.dtype for name, value in buffers.items()}
        for name, value in params.items():
            self.watch(name, value.detach().double() * UNITS)

    def integers(self) -> list[Tensor]:
        """Returns the integers of every param and buffer of the problem, in the order that they were given in."""
        return [*self.joint_params.split(self.params).values(), *self.joint_buffers.split(self.buffers).values()]

    def float_params(self) -> TensorDict:
        """Returns the params in the dtype of the problem."""
        return {name: decode(value, self._dtypes[name]) for name, value in self.params.items()}

    def float_buffers(self) -> TensorDict:
        """Returns the optimiser's buffers in the dtype of the problem."""
        return {name: decode(value, self._buffer_dtypes[name]) for name, value in self.buffers.items()}

    def multiply(self, buffer: str, factor: Factor) -> None:
        """Multiplies a buffer by a factor below 1 and keeps what that forgets."""
        self.buffers[buffer] = self.information[buffer].multiply(self.buffers[buffer], factor)

    def divide(self, buffer: str, factor: Factor) -> None:
        """Undoes the last multiplication of a buffer, whose factor this was."""
        self.buffers[buffer] = self.information[buffer].divide(self.buffers[buffer], factor)

    def watch(self, name: str, *numbers: Tensor) -> None:
        """Includes numbers of a block's part of the state in `largest`, without waiting for the device.

        Args:
            name: the block.
            numbers: in units of `2^-52`, integers or floating-point.
        """
        # An empty tensor has no largest entry, and PyTorch raises there.
        found = [value for value in numbers if value.numel()]
        if found:
            # With what was seen before, so one look at the end sees what happened at any step.
            self.largest[name] = largest([*found, self.largest[name]] if name in self.largest else found)

    def out_of_range(self) -> dict[str, float]:
        """Returns the blocks whose part of the state left the range of the integers, with the magnitude; NaN for one.

        Cost: one copy to the host.
        """
        if not self.largest:
            return {}
        values = (torch.stack(list(self.largest.values())) / UNITS).tolist()
        # Negated, so that NaN is out of range.
        return {name: value for name, value in zip(self.largest, values, strict=True) if not value < LARGEST_NUMBER}

    def information_bits(self, tasks_axis: bool) -> Tensor:
        """Returns the information kept per number in the buffers, the mean (unit: bits), shape `()` or `(tasks,)`."""
        bits = [buffer.information_bits() for buffer in self.information.values()]
        if tasks_axis:
            return torch.cat([value.reshape(len(value), -1) for value in bits], dim=1).mean(1)
        return torch.cat([value.flatten() for value in bits]).mean()


class ReversibleDynamics(GradientDynamics):
    """Dynamics that can step backwards exactly.

    `update` is the rule in floating point, of which derivatives are taken. `step_exact` and `unstep` are the same rule
    on integers, where adding is undone by subtracting, and multiplying with the help of the information buffer.
    """

    @abstractmethod
    def factors(self, params: TensorDict, hparams: TensorDict, indices: range) -> FactorSchedule:
        """Returns what buffers are multiplied by at the steps to come.

        Args:
            params: the trained parameters.
            hparams: the outer variables.
            indices: of the steps, counted since the state was made.
        """

    @abstractmethod
    def step_exact(self, exact: ExactState, gradient: GradientFunction, hparams: TensorDict, index: int) -> None:
        """Takes a step, in place.

        Args:
            exact: the state.
            gradient: of the inner loss of this step.
            hparams: the outer variables.
            index: steps since the state was made (unit: steps, from 0).
        """

    @abstractmethod
    def unstep(self, exact: ExactState, gradient: GradientFunction, hparams: TensorDict, index: int) -> None:
        """Undoes the last step, in place; all arguments are as they were for `step_exact`."""

    @abstractmethod
    def start_exact(
        self,
        params: TensorDict,
        state: TensorDict,
        hparams: TensorDict,
        indices: range,
        *,
        batch_dims: int | None = None,
    ) -> ExactState:
        """Returns params and buffers in integers, ready for the steps of these indices.

        Args:
            params: the params before the first step.
            state: the optimiser's buffers.
            hparams: the outer variables.
            indices: of the steps.
            batch_dims: leading axes of all params that are kept where params are held side by side: 1 with a tasks
                axis, else 0. None holds every param by itself, so that a message about a block names one param.
        """


def reversible_rule(dynamics: Dynamics) -> ReversibleDynamics | None:
    """Returns the rule by which dynamics step, if it is reversible; learnt first buffers do not change the rule."""
    if isinstance(dynamics, LearnedBuffers):
        return reversible_rule(dynamics.rule)
    return dynamics if isinstance(dynamics, ReversibleDynamics) else None
