"""What an inner optimiser is: a pure map from one inner state to the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from hypertorch.constraints import Constraint
from hypertorch.dynamics.hyper import Setting
from hypertorch.dynamics.setting_checks import check_settings
from hypertorch.inner_loss import InnerLoss
from hypertorch.types import TensorDict, TensorMapping


class Dynamics(ABC):
    """One step of the inner optimiser, `s_t = Phi_t(s_{t-1}, hparams)`, as a pure function.

    The inner state is the trained parameters and the optimiser's own buffers, both flat dictionaries of tensors.
    Leaves are frozen dataclasses of settings; a setting may be a number, a schedule, or an outer variable (`Hyper`).

    Attributes:
        separate_params: whether the params that `step` returns are new tensors, none computed from another, so that the
            next gradient can be taken in them as they are. Each class says so for itself; it is not inherited.
    """

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
        # What a rule returns is known of the class that wrote it, not of those that change it.
        cls.separate_params = vars(cls).get("separate_params", False)

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings that may be outer variables, by name."""
        return {}

    def init_hparams(self) -> TensorDict:
        """Returns outer variables that the dynamics itself owns, such as the weights of a learnt update rule."""
        return {}

    def constraints(self) -> dict[str, Constraint]:
        """Returns the natural constraints of learnt settings, by name or pattern of the outer variable."""
        return {}

    def check(self, params: TensorMapping, hparams: TensorMapping, num_steps: int) -> None:
        """Raises `ValueError` if the settings do not fit a problem; called once a run, before `init`.

        Dynamics that wrap others pass on to each what concerns it.

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
