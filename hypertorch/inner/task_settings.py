"""Settings of a dynamics that have a value of their own for every task: entries of the context."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.func import vmap

from hypertorch.autodiff.missing_derivatives import NotVectorisableError
from hypertorch.constraints import Constraint
from hypertorch.dynamics import Dynamics, GradientDynamics, Hyper
from hypertorch.dynamics.settings import Setting, parts
from hypertorch.types import TensorDict, TensorMapping


def for_tasks(dynamics: Dynamics, per_task: frozenset[str]) -> Dynamics:
    """Returns the dynamics for a batch of tasks, in which a setting may have a value for every task.

    A rule acts elementwise on params with a tasks axis, where all tasks share its settings. Where a setting is read
    from an entry with a tasks axis, the rule is vectorised over the tasks instead.

    Args:
        dynamics: of one task.
        per_task: names of the variables that have a tasks axis.

    Raises:
        NotVectorisableError: if a setting has a tasks axis, and the dynamics takes more of the loss than one gradient.
    """
    patterns = [
        part.pattern for value in dynamics.settings().values() for part in parts(value) if isinstance(part, Hyper)
    ]
    own = frozenset(name for name in per_task if any(fnmatchcase(name, pattern) for pattern in patterns))
    if not own:
        return dynamics
    if not isinstance(dynamics, GradientDynamics):
        raise NotVectorisableError(
            f"`{type(dynamics).__name__}` reads {sorted(own)} from the context, with a value for every task, and its "
            "step is more than an update along one gradient, which alone is vectorised over tasks",
            "Run the tasks one by one with `execution=ht.Execution(tasks='loop')`.",
        )
    return TaskSettings(rule=dynamics, own=own)


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskSettings(GradientDynamics):
    """A rule that is vectorised over the tasks, because its settings differ from task to task.

    Args:
        rule: of one task.
        own: names of the variables with a tasks axis that its settings are read from.
    """

    rule: GradientDynamics
    own: frozenset[str]

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the buffers of all tasks."""
        own, shared = self._split(hparams)
        return vmap(lambda params, own: self.rule.init(params, {**shared, **own}))(params, own)

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and buffers of all tasks after one step."""
        own, shared = self._split(hparams)

        def one_task(
            grads: TensorDict, params: TensorDict, state: TensorDict, own: TensorDict
        ) -> tuple[TensorDict, TensorDict]:
            return self.rule.update(grads, params, state, {**shared, **own}, index)

        return vmap(one_task)(grads, params, state, own)

    def settings(self) -> dict[str, Setting]:
        """Returns the settings of the rule."""
        return dict(self.rule.settings())

    def constraints(self) -> dict[str, Constraint]:
        """Returns the natural constraints of the rule."""
        return self.rule.constraints()

    def init_hparams(self) -> TensorDict:
        """Returns the outer variables that the rule owns."""
        return self.rule.init_hparams()

    def check(self, params: TensorMapping, hparams: TensorMapping, num_steps: int) -> None:
        """Raises `ValueError` if the settings do not fit; of what has a tasks axis, the first task's."""
        own = {name: hparams[name][0] for name in self.own}
        self.rule.check(params, {**hparams, **own}, num_steps)

    def _split(self, hparams: TensorDict) -> tuple[TensorDict, TensorDict]:
        """Returns what has a tasks axis, and what all tasks share."""
        own = {name: hparams[name] for name in self.own}
        return own, {name: value for name, value in hparams.items() if name not in self.own}
