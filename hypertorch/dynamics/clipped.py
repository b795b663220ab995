"""Gradients of the inner loss that are clipped before a rule sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.checks.values import check_kind
from hypertorch.constraints import Constraint, Positive
from hypertorch.dynamics.base import Dynamics, GradientDynamics
from hypertorch.dynamics.declared import Range, check_settings, intersections, setting
from hypertorch.dynamics.elementwise import safe_sqrt
from hypertorch.dynamics.settings import Hyper, Setting, UngroupedSetting, resolve
from hypertorch.types import TensorDict, TensorMapping

_EPS = 1e-6  # of `torch.nn.utils.clip_grad_norm_`
_NORM = Range(0.0, math.inf, Positive(), "It bounds a norm.", infinite=True)
_MAGNITUDE = Range(0.0, math.inf, Positive(), "It bounds a magnitude.", infinite=True)


@dataclass(frozen=True, eq=False)
class Clipped(Dynamics):
    """The same rule, along a clipped gradient of the inner loss.

    Example: `Clipped(Adam(lr=1e-2), max_norm=1.0)`.

    With `g` the gradient of the inner loss in all params, first `max_value` and then `max_norm`, each if it is given:

        g = min(max(g, -max_value), max_value)           entry by entry, as `torch.nn.utils.clip_grad_value_`
        g = min(1, max_norm / (|g| + 1e-6)) * g          with the norm over all params, as `clip_grad_norm_`

    With tasks, each has a norm of its own. The hypergradient runs through the norm: clipping is part of the step. It is
    exact wherever no entry and no norm lies on a bound; there the map bends, and the bound counts as not reached. A
    bound that no gradient reaches has a hypergradient of zero, which is right. There is one norm: to clip the gradient
    of several rules, wrap `Groups`; a member of `Groups` is not clipped by itself.

    Cost: that of the rule, and a pass over the gradient.

    Args:
        rule: the rule.
        max_norm: greatest norm over all params, at least 0: one number, a schedule of one for each step, or a `Hyper`
            of these; None does not clip the norm.
        max_value: greatest magnitude of an entry, at least 0; None does not clip entries.

    Raises:
        TypeError: if `rule` is no `GradientDynamics`, or a bound is of no known kind.
        ValueError: if neither bound is given, one is negative, or `max_norm` differs between params.

    References:
        Pascanu, Mikolov and Bengio (2013), On the difficulty of training recurrent neural networks, algorithm 1.
    """

    rule: GradientDynamics
    _: KW_ONLY
    max_norm: UngroupedSetting | None = setting(_NORM, None)
    max_value: Setting | None = setting(_MAGNITUDE, None)

    def __post_init__(self) -> None:
        why = (
            "a rule that asks for gradients itself does not say which of them to clip. Pass an instance such as "
            "`SGD(lr=0.1)`; for two bounds, give one `Clipped` both."
        )
        check_kind("`rule` of `Clipped`", self.rule, GradientDynamics, why)
        if self.max_norm is None and self.max_value is None:
            raise ValueError(
                "`Clipped` got neither `max_norm` nor `max_value`: it would change nothing. Give one, or use the rule "
                "alone."
            )
        if self.max_norm is not None:
            _check_one_for_all(self.max_norm)
        super().__post_init__()
        # Taken from the rule, which makes the params. A frozen dataclass sets a derived attribute this way.
        object.__setattr__(self, "separate_params", self.rule.separate_params)

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings of the rule, and the bounds."""
        return {**self.rule.settings(), **super().settings()}

    def constraints(self) -> dict[str, Constraint]:
        """Returns the natural constraints of the rule, and bounds > 0 where they are learnt directly."""
        return intersections([self.rule.constraints(), super().constraints()])

    def init_hparams(self) -> TensorDict:
        """Returns the outer variables that the rule owns."""
        return self.rule.init_hparams()

    def check(self, params: TensorMapping, hparams: TensorMapping, num_steps: int) -> None:
        """Raises `ValueError` if the rule or the bounds do not fit."""
        self.rule.check(params, hparams, num_steps)
        check_settings("Clipped", super().settings(), params, hparams, num_steps)

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the rule's buffers."""
        return self.rule.init(params, hparams)

    def step(
        self, loss: InnerLoss, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and buffers after one step of the rule along the clipped gradient."""
        # Nothing is detached below: with a constant norm, the derivative would be that of another map.
        grads = loss.gradient(params, hparams)
        if self.max_value is not None:
            grads = {
                name: _clamped(value, resolve(self.max_value, hparams, name, index)) for name, value in grads.items()
            }
        if self.max_norm is not None:
            # The loss is one number for each task, if there are tasks.
            tasks_axis = loss.value is not None and loss.value.dim() > 0
            bound = resolve(self.max_norm, hparams, "", index)  # one for all params, so no name is needed
            grads = _shortened(grads, bound, tasks_axis=tasks_axis)
        return self.rule.update(grads, params, state, hparams, index)


def _check_one_for_all(max_norm: Setting) -> None:
    differs = (
        isinstance(max_norm, Mapping)
        or (isinstance(max_norm, Hyper) and max_norm.per_parameter)
        or (isinstance(max_norm, Tensor) and max_norm.numel() != 1)
    )
    if differs:
        raise ValueError(
            f"`max_norm` of `Clipped` is {max_norm!r}, which differs between params: there is one norm, over all of "
            "them. Give one number, a schedule, or a `Hyper` with `per='one'` or `per='step'`."
        )


def _clamped(gradient: Tensor, bound: float | Tensor) -> Tensor:
    """Returns the gradient with its entries kept between `-bound` and `bound`."""
    if isinstance(bound, Tensor):
        # A learnt bound gets its derivative where it is reached. The sign is constant between jumps, so it needs no
        # graph.
        return torch.where(gradient.abs() > bound, gradient.detach().sign() * bound, gradient).to(gradient.dtype)
    return gradient.clamp(-bound, bound)


def _shortened(grads: TensorDict, bound: float | Tensor, *, tasks_axis: bool) -> TensorDict:
    """Returns the gradient times `min(1, bound / (norm + 1e-6))`, of each task by itself."""
    # All gradients may be zero at once, where the plain root has an infinite derivative.
    total = safe_sqrt(tree.dot(grads, grads, tasks_axis=tasks_axis)) + _EPS
    # An axis of size 1 would make the factor look like one for each task.
    bound = bound.reshape(()) if isinstance(bound, Tensor) else bound
    # With the 1e-6 in it: this is exactly where PyTorch's coefficient falls below 1.
    exceeds = total > bound
    # Divided by 1 where the bound is not reached: an infinite derivative that is not taken would make a NaN.
    factor = torch.where(exceeds, bound / torch.where(exceeds, total, 1.0), 1.0)
    return tree.scale(grads, factor)
