"""Vectorised tasks compared with one task alone: some batching rules of PyTorch have a wrong derivative."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypertorch import tree
from hypertorch.derivatives import vjp
from hypertorch.inner_loop import InnerLoop
from hypertorch.inner_state import InnerState
from hypertorch.missing_derivatives import NotVectorisableError
from hypertorch.types import TensorDict

Bound: TypeAlias = tuple[InnerLoop, TensorDict]
"""A loop, and its hyperparameters and context."""

_known: dict[Hashable, str | None] = {}


def refuse_wrong_vectorisation(kind: Hashable, bind: Callable[[], tuple[Bound, Bound]]) -> None:
    """Raises if the first step of a task differs between vectorised tasks and the task alone, or its derivative does.

    It is compared once for every kind of problem. A model that draws noise is not compared: its noise differs.

    Cost: a step and a vjp of all tasks, and of one, the first time.

    Args:
        kind: what is the same for problems that run the same code.
        bind: makes a loop of vectorised tasks, of at least one step, and one of the first of them without a tasks axis.

    Raises:
        NotVectorisableError: naming what differs, or if PyTorch cannot vectorise the tasks.
    """
    if kind not in _known:
        with _explained():
            _known[kind] = _difference(*bind())
    if _known[kind] is not None:
        raise NotVectorisableError(
            f"{_known[kind]} differs between vectorised tasks (by `vmap`) and a task alone: PyTorch returns a wrong "
            "derivative of an operation where tasks are vectorised, without a word",
            "Run the tasks one by one with `task_route='loop'`, or write the operation out of simpler ones.",
        )


@contextmanager
def _explained() -> Iterator[None]:
    """Says what to do where PyTorch cannot vectorise tasks at all."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("vmap|batching rule|batched tensor|functorch", str(error), flags=re.IGNORECASE):
            raise
        raise NotVectorisableError(
            "the inner problem cannot be vectorised (by vmap) over tasks. PyTorch says: "
            f"{str(error).splitlines()[0].removesuffix('.')}",
            "Run the tasks one by one with `task_route='loop'`.",
        ) from error


def _difference(of_tasks: Bound, of_one: Bound) -> str | None:
    """Returns what differs, in words; None for nothing, or if it cannot be told."""
    (together, variables), (alone, own) = of_tasks, of_one
    with torch.no_grad():
        before, single = together.initial(tree.detach(variables)), alone.initial(tree.detach(own))
        if not alone.carry:  # initial params may be drawn at random, and then differ
            params = {name: value[0] for name, value in before.params.items()}
            single = InnerState(params, alone.dynamics.init(alone.trained(params), tree.detach(own)))
    noise = _NoiseWatch()
    with noise:
        found, expected = _first_step(together, before, variables), _first_step(alone, single, own)
    if noise.seen:
        return None
    for part, singles in expected.items():
        # What is small beside the others (the gradient of a bias before a norm) counts by their size.
        least = max([1e-3 * float(value.norm()) for value in singles.values()] + [1e-30])
        for name, value in singles.items():
            rows = found[part].get(name, torch.zeros_like(value))
            error = float(((rows[0] if rows.dim() > value.dim() else rows) - value).norm())
            # Generous: in single precision a unit beside its kink may take the other side.
            tolerance = min(100.0 * max(together.inner_eps, torch.finfo(value.dtype).eps) ** 0.5, 0.1)
            if error > tolerance * max(float(value.norm()), least):
                return f"the {part} in `{name}`"
    return None


def _first_step(loop: InnerLoop, before: InnerState, variables: TensorDict) -> dict[str, TensorDict]:
    """Returns the first task's state after a step, and the derivative of it in what the step starts from."""
    leaves, departure = tree.leaves_requiring_grad(variables), loop.leaves(before)
    with torch.enable_grad():
        after = loop.step(departure, leaves, 0)
    moving = {
        name: value for name, value in zip(after.names(), after.tensors(), strict=True) if tree.is_differentiable(value)
    }
    seeds = [_of_first_task(value, has_tasks_axis=loop.has_tasks_axis) for value in moving.values()]
    starts = {**leaves, **tree.with_prefix("params", departure.params)}
    reached = vjp(list(moving.values()), seeds, starts)
    return {
        "state after a step": tree.detach(moving),
        "derivative of a step": {name: value for name, value in reached.items() if value is not None},
    }


def _of_first_task(value: Tensor, *, has_tasks_axis: bool) -> Tensor:
    """Returns a cotangent in which no sum is zero by symmetry, zero for all tasks but the first."""
    example = value[0] if has_tasks_axis else value
    seed = torch.arange(1, example.numel() + 1, device=value.device).cos().to(value.dtype).reshape(example.shape)
    if not has_tasks_axis:
        return seed
    seeds = torch.zeros_like(value)
    seeds[0] = seed
    return seeds


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
