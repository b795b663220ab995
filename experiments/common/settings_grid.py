"""A problem at every point of a grid of two of its hyperparameters: each point is a task, and all are run together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

import hypertorch as ht
from experiments.common.failures import ExpectedFailure
from hypertorch.autodiff.noise import preserved_generators, seed_generators
from hypertorch.inner.loop import INIT
from hypertorch.types import Batch, TensorDict

Scale: TypeAlias = Literal["linear", "log"]
_TOGETHER = ht.Execution(tasks="vmap")
_SETTING = re.compile(r"dynamics\.(\w+)")
_VARIABLE = re.compile(r"(?P<name>.+?)(\[(?P<index>\d+)\])?")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One of the two hyperparameters.

    Args:
        name: a setting of the dynamics, `dynamics.lr`; or an outer variable of one number, `l2`; or one entry of it,
            flattened, `weight[3]`.
        start: first value.
        stop: last value.
        scale: whether values, and the derivative in them, are those of the logarithm.
    """

    name: str
    start: float
    stop: float
    scale: Scale

    def coordinates(self, count: int, like: Tensor) -> Tensor:
        """Returns evenly spaced coordinates, shape `(count,)`: values, or their natural logarithms."""
        ends = torch.tensor([self.start, self.stop], dtype=like.dtype, device=like.device)
        first, last = (ends.log() if self.scale == "log" else ends).tolist()
        return torch.linspace(first, last, count, dtype=like.dtype, device=like.device)

    def values(self, coordinates: Tensor) -> Tensor:
        """Returns the values at coordinates."""
        return coordinates.exp() if self.scale == "log" else coordinates


@dataclass(frozen=True, kw_only=True, eq=False)
class Field:
    """Losses and hypergradients at the points of a grid.

    Args:
        axes: the two hyperparameters.
        coordinates: of the points, two of shape `(points,)`.
        losses: the outer loss, shape `(points,)`; infinite or NaN where the run diverged.
        hypergradients: in the coordinates, two of shape `(points,)`; NaN where they are not finite.
    """

    axes: tuple[Axis, Axis]
    coordinates: tuple[Tensor, Tensor]
    losses: Tensor
    hypergradients: tuple[Tensor, Tensor]


def field(
    problem: ht.BilevelProblem,
    axes: tuple[Axis, Axis],
    points: int,
    backend: ht.Hypergradient,
    execution: ht.Execution = _TOGETHER,
) -> Field:
    """Returns the field over a grid of `points * points` points; all start from the same first params.

    Cost: that of a problem with as many tasks.

    Args:
        problem: with one inner run.
        axes: the two hyperparameters.
        points: along each axis.
        backend: how hypergradients are computed.
        execution: how the tasks are run, which the points are.
    """
    like = next(iter(problem.init_hparams().values()))
    x, y = (axis.coordinates(points, like) for axis in axes)
    grid_y, grid_x = (side.flatten() for side in torch.meshgrid(y, x, indexing="ij"))
    coordinates = {"grid.x": grid_x, "grid.y": grid_y}
    losses = ht.unroll(grid_problem(problem, axes, coordinates), coordinates, execution=execution).outer_loss
    slopes = torch.full((2, points * points), torch.nan, dtype=like.dtype, device=like.device)

    def fill(where: Tensor) -> None:
        own = {name: value[where] for name, value in coordinates.items()}
        try:
            found = ht.hypergradient(grid_problem(problem, axes, own), own, backend=backend, execution=execution)
        except ht.errors.NonFiniteError:
            # One point spoils all that it is run with: halves find it, and it stays NaN.
            if len(where) > 1:
                fill(where[: len(where) // 2])
                fill(where[len(where) // 2 :])
            return
        # The outer loss is the mean over tasks, and each task has coordinates of its own.
        slopes[:, where] = len(where) * torch.stack([found.grads["grid.x"], found.grads["grid.y"]])

    finite = losses.isfinite().nonzero()[:, 0]
    if len(finite):
        fill(finite)
    return Field(axes=axes, coordinates=(grid_x, grid_y), losses=losses, hypergradients=(slopes[0], slopes[1]))


def grid_problem(problem: ht.BilevelProblem, axes: tuple[Axis, Axis], coordinates: TensorDict) -> ht.BilevelProblem:
    """Returns a problem with one task for every point.

    Args:
        problem: with one inner run.
        axes: the two hyperparameters.
        coordinates: of the points, `grid.x` and `grid.y`, shape `(points,)`; the outer variables of the result.

    Raises:
        ExpectedFailure: if the problem has tasks, a context or buffers, or a name stands for nothing.
    """
    if problem.num_tasks is not None or problem.context is not None or problem.inner.buffers:
        raise ExpectedFailure(
            "`experiment` has tasks, a context or running statistics, but every point of the field is a task of its "
            "own with one inner run. Choose an experiment with one run for each problem, such as noisy_digits."
        )
    constants = problem.init_hparams()
    dynamics = problem.dynamics
    for axis, name in zip(axes, ("x", "y"), strict=True):
        setting = _SETTING.fullmatch(axis.name)
        if setting is None:
            _check_variable(axis, constants)
        elif setting[1] not in dynamics.settings() or not dataclasses.is_dataclass(dynamics):
            raise ExpectedFailure(
                f"`{name}.name` is {axis.name!r}, but the dynamics has the settings {sorted(dynamics.settings())}. Use "
                f"one of these, or one of the outer variables {sorted(constants)}."
            )
        else:
            dynamics = dataclasses.replace(dynamics, **{setting[1]: ht.Hyper(name)})

    def context(hparams: TensorDict, points: Batch) -> TensorDict:
        assert isinstance(points, Tensor)
        own = {name: axis.values(hparams[f"grid.{name}"][points]) for axis, name in zip(axes, ("x", "y"), strict=True)}
        # Outside of the vectorised run, in which every task would draw first params of its own.
        first = [_first_params(problem, _variables(axes, constants, x, y)) for x, y in zip(*own.values(), strict=True)]
        return {**own, **{f"first.{name}": torch.stack([params[name] for params in first]) for name in first[0]}}

    return ht.BilevelProblem(
        _GridInner(problem, axes, constants, len(coordinates["grid.x"])),
        _GridOuter(problem, axes, constants, coordinates),
        dynamics=dynamics,
        num_steps=problem.num_steps,
        num_tasks=len(coordinates["grid.x"]),
        context=context,
        seed=problem.seed,
    )


def _first_params(problem: ht.BilevelProblem, variables: TensorDict) -> TensorDict:
    """Returns the first params of the problem, with the noise that a run of its first outer step has there."""
    device = next(iter(variables.values())).device
    with preserved_generators(device):
        seed_generators(device, problem.seed, 0, 0, INIT)
        return problem.inner.init_params(variables)


def _check_variable(axis: Axis, constants: TensorDict) -> None:
    found = _VARIABLE.fullmatch(axis.name)
    value = None if found is None else constants.get(found["name"])
    if found is None or value is None:
        raise ExpectedFailure(
            f"an axis is {axis.name!r}, which is none of the outer variables {sorted(constants)}. Use one of these, "
            "with the number of an entry in brackets, or a setting such as dynamics.lr."
        )
    if (found["index"] is None and value.numel() != 1) or int(found["index"] or 0) >= value.numel():
        raise ExpectedFailure(
            f"an axis is {axis.name!r}, but `{found['name']}` has {value.numel()} numbers, and an axis is one of them. "
            f"Write for example '{found['name']}[0]'."
        )


def _variables(axes: Sequence[Axis], constants: TensorDict, x: Tensor, y: Tensor) -> TensorDict:
    """Returns the problem's outer variables at a point."""
    variables = dict(constants)
    for axis, value in zip(axes, (x, y), strict=True):
        found = None if _SETTING.fullmatch(axis.name) else _VARIABLE.fullmatch(axis.name)
        if found is not None:
            old = variables[found["name"]]
            chosen = torch.arange(old.numel(), device=old.device).reshape(old.shape) == int(found["index"] or 0)
            variables[found["name"]] = torch.where(chosen, value, old)
    return variables


class _GridInner(ht.InnerProblem):
    def __init__(self, problem: ht.BilevelProblem, axes: Sequence[Axis], constants: TensorDict, points: int) -> None:
        self._problem, self._axes, self._constants, self._points = problem, axes, constants, points

    def init_params(self, hparams: TensorDict, context: TensorDict) -> TensorDict:
        return {name.removeprefix("first."): value for name, value in context.items() if name.startswith("first.")}

    def batch(self, step: int) -> Batch:
        return ht.tree.map_batch(
            lambda value: value.expand(self._points, *value.shape), self._problem.inner.batch(step)
        )

    def loss(
        self, params: TensorDict, hparams: TensorDict, batch: Batch, context: TensorDict
    ) -> Tensor | tuple[Tensor, TensorDict]:
        variables = _variables(self._axes, self._constants, context["x"], context["y"])
        return self._problem.inner.loss(params, variables, batch)


class _GridOuter(ht.OuterProblem):
    def __init__(
        self, problem: ht.BilevelProblem, axes: Sequence[Axis], constants: TensorDict, coordinates: TensorDict
    ) -> None:
        self._problem, self._axes, self._constants, self._coordinates = problem, axes, constants, coordinates
        self._batch = problem.outer.batch(0)

    def init_hparams(self) -> TensorDict:
        return self._coordinates

    def batch(self, outer_step: int) -> Batch:
        # The data is the same for all, so that only the points are handed on.
        return torch.arange(len(self._coordinates["grid.x"]))

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, context: TensorDict) -> Tensor:
        variables = _variables(self._axes, self._constants, context["x"], context["y"])
        return self._problem.outer.loss(params, variables, self._batch)
