"""Learnt first values of an optimiser's buffers, such as an initial momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from hypertorch import tree
from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_kind
from hypertorch.constraints import Constraint
from hypertorch.dynamics.base import GradientDynamics
from hypertorch.dynamics.settings import Setting
from hypertorch.types import TensorDict, TensorMapping


@dataclass(frozen=True, eq=False)
class LearnedBuffers(GradientDynamics):
    """The same rule, with first buffers `v_0` read from the outer variables: they have a hypergradient.

    The entry `f"{name}.{buffer}.{parameter}"` of `hparams` is the first value of a buffer, and each buffer without one
    starts as the rule says. Put the entries into `OuterProblem.init_hparams`; with tasks, all start from the same.

    Example: `LearnedBuffers(SGD(lr=0.1, momentum=0.9))` with the outer variable `"buffers.momentum.weight"`.

    A mean square (`exp_avg_sq`, `square_avg`, `sum`) must stay at least 0: give it the constraint `ht.Box(lower=0.0)`.
    With dampening, `SGD` reads its first buffer only if `dampen_first` is True.

    Cost: that of the rule.

    Args:
        rule: the rule whose buffers are learnt.
        name: prefix of the entries.

    Raises:
        TypeError: if `rule` is no `GradientDynamics`.
        ValueError: (from a run) if no entry has the prefix, one names no buffer of the rule, or has a wrong shape.

    References:
        Maclaurin, Duvenaud and Adams (2015), Gradient-based hyperparameter optimization through reversible learning,
        algorithm 2 (which returns the derivative in `v_0` beside all others).
    """

    rule: GradientDynamics
    _: KW_ONLY
    name: str = "buffers"

    def __post_init__(self) -> None:
        check_fields(self, "name")
        why = "only such a rule's buffers are known by name. Pass an instance such as `SGD(lr=0.1, momentum=0.9)`."
        check_kind("`rule` of `LearnedBuffers`", self.rule, GradientDynamics, why)

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings of the rule."""
        return self.rule.settings()

    def constraints(self) -> dict[str, Constraint]:
        """Returns the natural constraints of the rule."""
        return self.rule.constraints()

    def init_hparams(self) -> TensorDict:
        """Returns the outer variables that the rule owns."""
        return self.rule.init_hparams()

    def check(self, params: TensorMapping, hparams: TensorMapping, num_steps: int) -> None:
        """Raises `ValueError` if the rule does not fit, or the entries are not first values of its buffers."""
        self.rule.check(params, hparams, num_steps)
        # Without a step no buffer is read.
        if not num_steps:
            return
        # For one task, without a tasks axis, as the entries are.
        buffers = self.rule.init(dict(params), dict(hparams))
        learnt = tree.without_prefix(self.name, hparams)
        if not learnt:
            raise ValueError(
                f"`hparams` has no entry `{self.name}.{{buffer}}.{{parameter}}`, so `LearnedBuffers` would learn "
                f"nothing. Return one of {[f'{self.name}.{buffer}' for buffer in buffers]} from `init_hparams`, or use "
                "the rule alone."
            )
        for buffer, value in learnt.items():
            self._check_entry(buffer, value, buffers)

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the rule's buffers, those that are learnt at their entries of `hparams`."""
        buffers = self.rule.init(params, hparams)
        learnt = tree.without_prefix(self.name, hparams)
        # With tasks, buffers have their axis in front and the entry has none: all tasks start from views of the same.
        return {key: learnt[key].expand(value.shape) if key in learnt else value for key, value in buffers.items()}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and buffers after one step of the rule."""
        return self.rule.update(grads, params, state, hparams, index)

    def _check_entry(self, buffer: str, value: Tensor, buffers: TensorDict) -> None:
        if buffer not in buffers:
            raise ValueError(
                f"`hparams` has the entry `{self.name}.{buffer}`, but `{type(self.rule).__name__}` has no buffer "
                f"`{buffer}` (it has {sorted(buffers)}): it would do nothing. Rename it, or give `LearnedBuffers` "
                "another `name`."
            )
        first = buffers[buffer]
        # No broadcasting here: an entry of another shape would be the start of several numbers at once.
        if value.shape != first.shape or value.dtype != first.dtype:
            raise ValueError(
                f"`{self.name}.{buffer}` has shape {tuple(value.shape)} and dtype {value.dtype}, but it is the first "
                f"value of a buffer of shape {tuple(first.shape)} and dtype {first.dtype}. Start from zeros of that "
                "shape and dtype."
            )
