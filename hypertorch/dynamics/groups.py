"""Different update rules for different parts of the params."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hypertorch import tree
from hypertorch.checks.values import check_kind
from hypertorch.constraints import Constraint
from hypertorch.dynamics.base import GradientDynamics
from hypertorch.dynamics.declared import intersections
from hypertorch.dynamics.settings import Setting, belonging, check_patterns
from hypertorch.types import TensorDict, TensorMapping


@dataclass(frozen=True, eq=False)
class Groups(GradientDynamics):
    """Every part of the params follows a rule of its own, along one gradient of all params.

    Example: `Groups({"head.*": Adam(lr=1e-2), "*": SGD(lr=Hyper("body_lr"))})`. For parts that differ in a setting
    alone, give the setting as a mapping: `SGD(lr={"head.*": 0.1, "*": 0.01})`.

    With `w_i` the params that belong to member `i`, `g_i` their part of the gradient and `v_i` the member's buffers:

        w_i, v_i = update_i(g_i, w_i, v_i)

    Cost: one gradient per step; the state of all members, the buffers of member `i` under `{i}.{buffer}`.

    Args:
        members: from names or patterns of parameters (`*`, `?`, `[...]`, as in file names) to rules. A name wins over
            a pattern, an earlier pattern over a later one; every parameter must belong to one.

    Raises:
        TypeError: if a member is no `GradientDynamics`.
        ValueError: if there is no member; (from a run) if a parameter belongs to none or a member has no parameter, or
            two members own outer variables of the same name.
    """

    members: Mapping[str, GradientDynamics]

    def __post_init__(self) -> None:
        if not isinstance(self.members, Mapping) or not self.members:
            raise ValueError(
                f"`members` of `Groups` is {self.members!r}: it maps patterns of parameters to their rules. Pass at "
                "least one, such as `Groups({'head.*': SGD(lr=0.1), '*': Adam()})`."
            )
        for pattern, member in self.members.items():
            why = (
                "the members share one gradient of all params, and a rule that asks for gradients itself cannot take "
                "part. Use a rule with an `update`, such as `SGD`."
            )
            check_kind(f"`members[{pattern!r}]` of `Groups`", member, GradientDynamics, why)

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings of all members, `[{pattern}].{setting}`."""
        return {
            f"[{pattern}].{name}": setting
            for pattern, member in self.members.items()
            for name, setting in member.settings().items()
        }

    def constraints(self) -> dict[str, Constraint]:
        """Returns the natural constraints of all members; a variable that several read is kept in all ranges."""
        return intersections(member.constraints() for member in self.members.values())

    def init_hparams(self) -> TensorDict:
        """Returns the outer variables that the members own."""
        owned: TensorDict = {}
        for pattern, member in self.members.items():
            own = member.init_hparams()
            clash = sorted(owned.keys() & own.keys())
            if clash:
                raise ValueError(
                    f"`members[{pattern!r}]` of `Groups` and a member before it both own the outer variables {clash}: "
                    "one value cannot start from two. Give one of them another name (`LearnedUpdate(rule, name=...)`)."
                )
            owned.update(own)
        return owned

    def check(self, params: TensorMapping, hparams: TensorMapping, num_steps: int) -> None:
        """Raises `ValueError` if the members do not fit the params, or a member its own part of them."""
        if params:
            check_patterns("`members` of `Groups`", self.members, params)
        for pattern, member in self.members.items():
            # Its own part alone: `Muon` for the matrices must not see the biases of another member.
            member.check(self._part(pattern, params), hparams, num_steps)

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the buffers of all members, those of member `i` as `{i}.{buffer}`."""
        state: TensorDict = {}
        for position, (pattern, member) in enumerate(self.members.items()):
            # By position: a pattern may hold dots, and dots separate the parts of a name.
            state.update(tree.with_prefix(f"{position}", member.init(self._part(pattern, params), hparams)))
        return state

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and buffers after one step of every member on its own part of `grads`."""
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for position, (pattern, member) in enumerate(self.members.items()):
            prefix = f"{position}"
            part, own_state = member.update(
                self._part(pattern, grads),
                self._part(pattern, params),
                tree.without_prefix(prefix, state),
                hparams,
                index,
            )
            new_params.update(part)
            new_state.update(tree.with_prefix(prefix, own_state))
        # Put back into the order of the params: the members return them part by part.
        return {name: new_params[name] for name in params}, new_state

    def _part(self, pattern: str, values: Mapping[str, Tensor]) -> TensorDict:
        return {name: values[name] for name in belonging(self.members, pattern, values)}
