"""Vectorised tasks compared with one task alone: some batching rules of PyTorch have a wrong derivative."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypertorch import tree
from hypertorch.autodiff.inner_loss import GradientRoute
from hypertorch.autodiff.missing_derivatives import NotVectorisableError
from hypertorch.autodiff.products import vjp
from hypertorch.hypergradients.guards.first_task import FirstTask
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.inner.tasks import not_vectorisable
from hypertorch.types import TensorDict

Use: TypeAlias = Literal["values", "first", "second"]
"""What a run takes of the losses beside the inner gradient: values, first derivatives, or second ones too."""


class _Bound(NamedTuple):
    """A loop with its hyperparameters and context."""

    loop: InnerLoop
    variables: TensorDict


def refuse_wrong_vectorisation(first: FirstTask, use: Use) -> None:
    """Raises if the first task comes out otherwise among vectorised tasks than alone, or its derivative does.

    Compared are the first state, a step, and the outer loss with its term at that step. A part that draws noise is not
    compared: its noise differs.

    Cost: for all tasks and for one, two steps and an evaluation of each loss, with a vjp of each where derivatives are
    used.

    Args:
        first: the first task, among others.
        use: what the run takes of the losses.

    Raises:
        NotVectorisableError: naming what differs, or the operation that PyTorch cannot vectorise.
    """
    difference = _difference(_Bound(*first.loop_of_all()), _Bound(*first.loop()), use)
    if difference is not None:
        raise NotVectorisableError(
            f"{difference} differs between vectorised tasks (by `vmap`) and a task alone: PyTorch returns a wrong "
            "result or derivative of an operation where tasks are vectorised, without a word",
            "Run the tasks one by one with `execution=ht.Execution(tasks='loop')`, or write the operation out of "
            "simpler ones.",
        )


def _difference(together: _Bound, alone: _Bound, use: Use) -> str | None:
    """Returns what differs, in words; None for nothing, or if it cannot be told."""
    with torch.no_grad():
        own = alone.loop.initial(alone.variables)
        with _explained():
            before = together.loop.initial(together.variables)
            # The outer loss is compared after a step: many networks start with zeros, which hide a derivative.
            after = together.loop.advance(before, together.variables, 0) if together.loop.num_steps else before
        if not alone.loop.carry:  # initial params may be drawn at random, and then differ
            params = _first_rows(before.params)
            own = InnerState(params, alone.loop.dynamics.init(alone.loop.trained(params), alone.variables))
    one = _FirstTask(alone, own, _first_rows(after.params), use)
    among_all = _FirstTask(together, before, after.params, use)
    for name in one.parts:
        with _NoiseWatch() as noise:
            # Alone first: an error of the problem itself is raised there, as it is.
            expected = one.compute(name)
            with _explained():
                found = among_all.compute(name)
        if noise.seen:
            continue
        for what, rows, singles in zip((name, f"derivative of the {name}"), found, expected, strict=True):
            entry = _different_entry(rows, singles, together.loop.inner_eps)
            if entry is not None:
                return f"the {what} (`{entry}`)"
    return None


def _first_rows(values: TensorDict) -> TensorDict:
    return {name: value[0] for name, value in values.items()}


def _different_entry(of_all: TensorDict, of_one: TensorDict, inner_eps: float) -> str | None:
    """Returns the name of the first entry that differs by more than rounding; None if none does."""
    # What is small beside the others (the gradient of a bias before a norm) counts by their size.
    least = max([1e-3 * float(value.norm()) for value in of_one.values()] + [1e-30])
    for name, value in of_one.items():
        rows = of_all.get(name, torch.zeros_like(value))
        error = float(((rows[0] if rows.dim() > value.dim() else rows) - value).norm())
        # Generous: in single precision a unit beside its kink may take the other side.
        tolerance = min(100.0 * max(inner_eps, torch.finfo(value.dtype).eps) ** 0.5, 0.1)
        if error > tolerance * max(float(value.norm()), least):
            return name
    return None


class _FirstTask:
    """The first task of a loop, in parts that can be compared.

    Args:
        of: the loop.
        before: its state before the first step.
        params_after: its params after that step.
        use: what a run takes of the losses.

    Attributes:
        parts: names of the parts.
    """

    def __init__(self, of: _Bound, before: InnerState, params_after: TensorDict, use: Use) -> None:
        self._loop = loop = of.loop
        self._use: Use = use
        self._variables = tree.leaves_requiring_grad(of.variables)
        self._before = loop.leaves(before)
        self._after = loop.leaves(InnerState(params_after, {})).params
        self.parts = [
            *(["first state"] if not loop.carry else []),
            *(["inner loss", "state after a step", "term of the outer loss"] if loop.num_steps else []),
            "outer loss",
        ]

    def compute(self, part: str) -> tuple[TensorDict, TensorDict]:
        """Returns a part's tensors of all tasks, and the derivative of those of the first task."""
        with torch.enable_grad():
            outputs = self._outputs(part)
        outputs = {name: value for name, value in outputs.items() if tree.is_differentiable(value)}
        if self._use == "values":
            return tree.detach(outputs), {}
        seeds = [_of_first_task(value, has_tasks_axis=self._loop.has_tasks_axis) for value in outputs.values()]
        params = self._after if "outer" in part else self._before.params
        starts = {**self._variables, **tree.with_prefix("params", params)}
        reached = vjp(list(outputs.values()), seeds, starts)
        return tree.detach(outputs), {name: value for name, value in reached.items() if value is not None}

    def _outputs(self, part: str) -> TensorDict:
        loop, variables, before = self._loop, self._variables, self._before
        if part == "inner loss":
            return {"InnerProblem.loss": loop.loss_at(before, 0)(loop.trained(before.params), variables)}
        if part == "outer loss":
            return {"OuterProblem.loss": loop.outer(self._after, variables, of_each_task=True)}
        if part == "term of the outer loss":
            terms = loop.term(InnerState(self._after, {}), variables, 0, of_each_task=True)
            return {} if terms is None else {"OuterProblem.step_loss": terms}
        if part == "first state":
            return _named(loop.initial(variables))
        # A run that takes first derivatives must not fail where there is no second.
        route: GradientRoute = "differentiable" if self._use == "second" else "constant"
        return _named(loop.transition(before, variables, 0, route)[0])


def _named(state: InnerState) -> TensorDict:
    return dict(zip(state.names(), state.tensors(), strict=True))


def _of_first_task(value: Tensor, *, has_tasks_axis: bool) -> Tensor:
    """Returns a cotangent in which no sum is zero by symmetry, zero for all tasks but the first."""
    example = value[0] if has_tasks_axis else value
    seed = torch.arange(1, example.numel() + 1, device=value.device).cos().to(value.dtype).reshape(example.shape)
    if not has_tasks_axis:
        return seed
    seeds = torch.zeros_like(value)
    # Zero for the others: in shared hyperparameters the derivative is then that of the first task alone.
    seeds[0] = seed
    return seeds


@contextmanager
def _explained() -> Iterator[None]:
    """Says what to do where tasks together fail, for a problem that has run with one task alone."""
    try:
        yield
    except (NotVectorisableError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        # A loss that fails is explained where it is vectorised: what is left is its gradient.
        raise not_vectorisable("the gradient of a loss", error) from error


class _NoiseWatch(TorchDispatchMode):
    """Looks out for operations that draw noise, from whatever generator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
