"""The first task of a problem, which is looked at for all, and the functions that it is looked at with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from hypertorch import tree
from hypertorch.errors import ReplayError
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.tasks import TaskSlice
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstTask:
    """The first task of a problem, which is looked at for all.

    Attributes:
        bound: the problem.
        hparams: the outer variables.
        item: the first tasks that are run, by themselves or together; None for a problem without tasks.
    """

    bound: BoundProblem
    hparams: TensorDict
    item: TaskSlice | None

    @property
    def among_others(self) -> bool:
        """Whether it is run together with other tasks, vectorised."""
        return self.item is not None and not self.item.squeeze

    def loop(self) -> tuple[InnerLoop, TensorDict]:
        """Returns its loop and variables, with the outer data drawn and the context computed anew."""
        bound, variables, context = self._context()
        if self.among_others:
            own = context.keys() - set(bound.problem.shared_context)
            context = {name: value[0] if name in own else value for name, value in context.items()}
        item = self.item
        task = None if item is None else replace(item, stop=item.start + 1, squeeze=True, whole=False)
        return bound.loop(task, context), {**variables, **tree.leaves_requiring_grad(context)}

    def loop_of_all(self) -> tuple[InnerLoop, TensorDict]:
        """Returns the loop and variables of the tasks that it is run with."""
        bound, variables, context = self._context()
        return bound.loop(self.item, context), {**variables, **tree.leaves_requiring_grad(context)}

    def _context(self) -> tuple[BoundProblem, TensorDict, TensorDict]:
        bound = self.bound.drawn_again(self.hparams)
        leaves = tree.leaves_requiring_grad(self.hparams)
        # Copies: PyTorch would object to a change of leaves in words of its own.
        given = {name: value.clone() for name, value in leaves.items()}
        with arguments_kept("context", hparams=given):
            return bound, leaves, bound.context(given, self.item)


@contextmanager
def arguments_kept(function: str, **arguments: TensorDict) -> Iterator[None]:
    """Raises `ReplayError` at the end if a function has changed its arguments: the run would go on with what it left.

    Args:
        function: its name, for the message.
        arguments: the dicts that it is handed, by the names of its arguments.
    """
    before = {
        which: {name: (value, value.detach().clone()) for name, value in arguments[which].items()}
        for which in arguments
    }
    yield
    for which, entries in arguments.items():
        for name in {**before[which], **entries}:
            if not _is_kept(entries, name, before[which]):
                raise ReplayError(
                    f"`{function}` changes its argument `{which}[{name!r}]`: the run would go on with the changed "
                    "value, and steps that are run again would start from it. Leave arguments as they are: make a new "
                    f"dict, such as `{{**{which}, {name!r}: ...}}`, and new tensors, by operations that do not work "
                    "in place (no `clamp_`, no `.data`, no assignment to an index); or change a copy (`.clone()`)."
                )


def _is_kept(entries: TensorDict, name: str, before: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    # By identity first: a new tensor in the caller's dict is a change, whatever it holds.
    if name not in entries or name not in before or entries[name] is not before[name][0]:
        return False
    value, kept = entries[name].detach(), before[name][1]
    return bool(((value == kept) | ((value != value) & (kept != kept))).all())  # NaN is kept where it was
