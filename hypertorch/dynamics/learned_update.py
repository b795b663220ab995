"""A learnt optimiser: the inner update is computed by a network whose weights are outer variables."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

from torch import Tensor, nn

from hypertorch import tree
from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_kind
from hypertorch.constraints import Positive
from hypertorch.dynamics.base import GradientDynamics, by_parameter, flattened
from hypertorch.dynamics.declared import Range, setting
from hypertorch.dynamics.settings import Setting
from hypertorch.nn.functional_module import FunctionalModule
from hypertorch.types import TensorDict

_SCALE = Range(0.0, math.inf, Positive(), "The rule itself learns the sign.")


class UpdateRule(nn.Module, ABC):
    """A network that maps gradients to updates, one coordinate at a time, with a recurrent state per coordinate.

    All coordinates of all parameters share its weights, so that a rule learnt on small problems can train large ones.
    """

    @abstractmethod
    def initial_state(self, like: Tensor) -> TensorDict:
        """Returns the state before the first step: constants, named without dots.

        Args:
            like: an inner parameter, for its shape, dtype and device.

        Returns:
            Tensors of shape `(*like.shape, ...)`; none for a rule without memory.
        """

    @abstractmethod
    def forward(self, gradient: Tensor, state: TensorDict) -> tuple[Tensor, TensorDict]:
        """Returns the update, of the gradient's shape, and the next state.

        Must be elementwise in the coordinates of `gradient` (any number of axes, a tasks axis among them), and twice
        differentiable: recurrent modules of PyTorch are not, and have to be written out.

        Args:
            gradient: of the inner loss in one parameter.
            state: the state of that parameter.
        """


@dataclass(frozen=True, eq=False)
class LearnedUpdate(GradientDynamics):
    """Descent by a learnt update rule `m` with weights `phi`, coordinate by coordinate.

    With `g` the gradient of the inner loss and `h` the rule's state:

        u, h = m(g, h, phi)
        w = w + scale * u

    The weights `phi` are outer variables that the dynamics own: `init_hparams` returns them as `{name}.{weight}`, and
    the module given as `rule` is never changed. A rule learns to descend from the outer loss alone; terms at all inner
    steps (`OuterProblem.step_loss`) tell it much more than the last params do.

    With `gradient_is_constant`, `g` enters without its derivatives, which saves the second derivatives of the inner
    loss in backends that unroll. Then **every path that runs through a gradient is dropped**, `dg/dw` and
    `dg/dhparams`: hypergradients of `phi` and `scale` are approximate; an initialisation sees the rest of the run as a
    constant shift; a hyperparameter that only the inner loss reads has no path left and is refused as detached, and
    one that the outer loss reads too keeps *its direct term only*. Use it where `phi` and `scale` are all that is
    learnt.

    Cost: one gradient and one evaluation of the rule on every coordinate per step; state as the rule's.

    Args:
        rule: the update rule, with its first weights; it must have the dtype and device of the inner parameters.
        name: prefix of the weights among the outer variables.
        scale: of the update, at least 0; a small one keeps a rule that has not learnt anything from diverging.
        gradient_is_constant: drop the derivatives of the gradient, as Andrychowicz et al. do.

    Raises:
        TypeError: if `rule` is no `UpdateRule`.
        ValueError: if `scale` is out of range; (from a run) if the weights are not among the outer variables, or the
            rule returns an update of another shape or a state with a dot in a name.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, equation 3;
        Chen et al. (2017), Learning to learn without gradient descent by gradient descent (losses over the whole run).
    """

    rule: UpdateRule
    _: KW_ONLY
    name: str = "update_rule"
    scale: Setting = setting(_SCALE, 0.1)
    gradient_is_constant: bool = False

    def __post_init__(self) -> None:
        why = (
            "it has no state per coordinate. Pass an instance of a subclass, such as "
            "`ht.dynamics.CoordinatewiseLSTM()`."
        )
        check_kind("`rule`", self.rule, UpdateRule, why)
        check_fields(self, "name")
        super().__post_init__()

    def init_hparams(self) -> TensorDict:
        """Returns copies of the rule's trainable weights, as `{name}.{weight}`."""
        # Copies, so that outer steps in place leave the module as the user made it.
        first = self._function.init_params()
        return tree.with_prefix(self.name, {name: first[name] for name in self._function.trained_names()})

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the rule's state before the first step, `{entry}.{parameter}`."""
        self._weights(hparams)
        buffers = {name: self.rule.initial_state(_with_axis(param)) for name, param in params.items()}
        for own in buffers.values():
            for entry in own:
                if "." in entry:
                    raise ValueError(
                        f"`{type(self.rule).__name__}.initial_state` names an entry `{entry}`: a dot separates it from "
                        "the parameter's name. Rename it without one."
                    )
        return flattened(buffers)

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and the rule's state after one step."""
        weights = self._weights(hparams)
        (scale,) = self.values(params, hparams, index)
        buffers = by_parameter(state)
        new_params: TensorDict = {}
        new_buffers: dict[str, TensorDict] = {}
        for name, param in params.items():
            # Cut before the rule sees it: no derivative then runs back through the gradient of the inner loss.
            gradient = grads[name].detach() if self.gradient_is_constant else grads[name]
            update, new_buffers[name] = self._function(weights, _with_axis(gradient), buffers.get(name, {}))
            self._check_update(update, name, _with_axis(param))
            # Added: the rule learns the direction, and with it the sign. The reshape takes off the axis of a scalar.
            new_params[name] = param + scale[name] * update.reshape(param.shape)
        return new_params, flattened(new_buffers)

    @cached_property
    def _function(self) -> FunctionalModule:
        return FunctionalModule(self.rule)

    def _weights(self, hparams: TensorDict) -> TensorDict:
        """Returns the rule's weights among the outer variables; one that is missing would silently be a constant."""
        names = self._function.trained_names()
        missing = [name for name in names if f"{self.name}.{name}" not in hparams]
        if missing:
            raise ValueError(
                f"`hparams` lacks `{self.name}.{missing[0]}`, a weight of the `LearnedUpdate` named {self.name!r}: it "
                "would not be learnt. Start from `problem.init_hparams()`, which returns the weights that dynamics own."
            )
        return {name: hparams[f"{self.name}.{name}"] for name in names}

    def _check_update(self, update: Tensor, name: str, param: Tensor) -> None:
        if update.shape != param.shape:
            raise ValueError(
                f"`{type(self.rule).__name__}` returned an update of shape {tuple(update.shape)} for `{name}` of shape "
                f"{tuple(param.shape)}: each coordinate needs one. Drop the axis of features, for instance with "
                "`.squeeze(-1)`."
            )


def _with_axis(value: Tensor) -> Tensor:
    """Returns a tensor with an axis: PyTorch computes tangents of 0-dimensional ones in double precision at times."""
    return value.reshape(1) if value.dim() == 0 else value
