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
from experiments.common.commands.failures import ExpectedFailure
from hypertorch.autodiff.noise import preserved_generators, seed_generators
from hypertorch.inner.loop import INIT
from hypertorch.types import Batch, TensorDict

Scale: TypeAlias = Literal["linear", "log"]
_TOGETHER = ht.Execution(tasks="vmap")
_ON_AXES = ("axis x", "axis y")  # entries of the context that settings of the dynamics are read from
_FIRST = "first params: "
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

    The outer variables of the problem itself are its context, those on an axis with a value for every task.

    Args:
        problem: with one inner run.
        axes: the two hyperparameters.
        coordinates: of the points, `grid.x` and `grid.y`, shape `(points,)`; the outer variables of the result.

    Raises:
        ExpectedFailure: if the problem has tasks, a context, buffers or terms at inner steps, a name stands for
            nothing, both stand for one number, or a setting cannot be as large or small as its axis says.
    """
    if problem.num_tasks is not None or problem.context is not None or problem.inner.buffers:
        raise ExpectedFailure(
            "`experiment` has tasks, a context or running statistics, but every point of the field is a task of its "
            "own with one inner run. Choose an experiment with one run for each problem, such as noisy_digits."
        )
    if problem.outer.has_step_loss:
        raise ExpectedFailure(
            "`experiment` has an outer loss with terms at inner steps, which the field leaves out. Choose an "
            "experiment that judges the last params alone."
        )
    constants = problem.init_hparams()
    targets = [_target(axis, problem.dynamics, constants) for axis in axes]
    if targets[0] == targets[1]:
        raise ExpectedFailure(
            f"`x` and `y` are {axes[0].name!r} and {axes[1].name!r}, which is one number: a plane needs two. Change "
            "one of them."
        )
    settings = {name: ht.Hyper(key) for key, (name, index) in zip(_ON_AXES, targets, strict=True) if index is None}
    moved = {name for name, index in targets if index is not None}

    def at(x: Tensor, y: Tensor) -> TensorDict:
        """Returns the outer variables of the problem at a point."""
        variables = dict(constants)
        for value, (name, index) in zip((x, y), targets, strict=True):
            if index is not None:
                old = variables[name]
                chosen = torch.arange(old.numel(), device=old.device).reshape(old.shape) == index
                variables[name] = torch.where(chosen, value, old)
        return variables

    def context(hparams: TensorDict, points: Batch) -> TensorDict:
        assert isinstance(points, Tensor)
        x, y = (axis.values(hparams[f"grid.{side}"][points]) for axis, side in zip(axes, "xy", strict=True))
        own = [at(*values) for values in zip(x, y, strict=True)]
        # Outside of the vectorised run, in which every task would draw first params of its own.
        first = [_first_params(problem, variables) for variables in own]
        return {
            **dict(zip(_ON_AXES, (x, y), strict=True)),
            **{name: torch.stack([variables[name] for variables in own]) for name in moved},
            **{name: value for name, value in constants.items() if name not in moved},
            **{f"{_FIRST}{name}": torch.stack([params[name] for params in first]) for name in first[0]},
        }

    points = len(coordinates["grid.x"])
    return ht.BilevelProblem(
        _GridInner(problem, list(constants), points),
        _GridOuter(problem, list(constants), coordinates),
        dynamics=dataclasses.replace(problem.dynamics, **settings) if settings else problem.dynamics,  # type: ignore[type-var]
        num_steps=problem.num_steps,
        num_tasks=points,
        context=context,
        shared_context=tuple(name for name in constants if name not in moved),
        seed=problem.seed,
    )


def _first_params(problem: ht.BilevelProblem, variables: TensorDict) -> TensorDict:
    """Returns the first params of the problem, with the noise that a run of its first outer step has there."""
    device = next(iter(variables.values())).device
    with preserved_generators(device):
        seed_generators(device, problem.seed, 0, 0, INIT)
        return problem.inner.init_params(variables)


def _target(axis: Axis, dynamics: ht.Dynamics, constants: TensorDict) -> tuple[str, int | None]:
    """Returns the setting that an axis is, with None; or the outer variable, with the number of the entry."""
    setting = _SETTING.fullmatch(axis.name)
    if setting is not None:
        name = setting[1]
        if not dataclasses.is_dataclass(dynamics) or name not in dynamics.settings():
            raise ExpectedFailure(
                f"an axis is {axis.name!r}, but the dynamics has the settings {sorted(dynamics.settings())}. Use one "
                f"of these, or one of the outer variables {sorted(constants)}."
            )
        for end in (axis.start, axis.stop):
            try:
                dataclasses.replace(dynamics, **{name: end})
            except ValueError as error:
                raise ExpectedFailure(f"the axis {axis.name!r} reaches {end}, but {error}") from error
        return name, None
    found = _VARIABLE.fullmatch(axis.name)
    if found is None or found["name"] not in constants:
        raise ExpectedFailure(
            f"an axis is {axis.name!r}, which is none of the outer variables {sorted(constants)}. Use one of these, "
            "with the number of an entry in brackets, or a setting such as dynamics.lr."
        )
    name, index, count = found["name"], int(found["index"] or 0), constants[found["name"]].numel()
    if (found["index"] is None and count != 1) or index >= count:
        raise ExpectedFailure(
            f"an axis is {axis.name!r}, but `{name}` has {count} numbers, and an axis is one of them. Write for "
            f"example 'x=\"{name}[0]\"', with both kinds of quotes."
        )
    return name, index


class _GridInner(ht.InnerProblem):
    def __init__(self, problem: ht.BilevelProblem, names: Sequence[str], points: int) -> None:
        self._problem, self._names, self._points = problem, names, points

    def init_params(self, hparams: TensorDict, context: TensorDict) -> TensorDict:
        return {name.removeprefix(_FIRST): value for name, value in context.items() if name.startswith(_FIRST)}

    def batch(self, step: int) -> Batch:
        return ht.tree.map_batch(
            lambda value: value.expand(self._points, *value.shape), self._problem.inner.batch(step)
        )

    def loss(
        self, params: TensorDict, hparams: TensorDict, batch: Batch, context: TensorDict
    ) -> Tensor | tuple[Tensor, TensorDict]:
        return self._problem.inner.loss(params, {name: context[name] for name in self._names}, batch)


class _GridOuter(ht.OuterProblem):
    def __init__(self, problem: ht.BilevelProblem, names: Sequence[str], coordinates: TensorDict) -> None:
        self._problem, self._names, self._coordinates = problem, names, coordinates
        self._batch = problem.outer.batch(0)

    def init_hparams(self) -> TensorDict:
        return self._coordinates

    def batch(self, outer_step: int) -> Batch:
        # The data is the same for all, so that only the points are handed on.
        return torch.arange(len(self._coordinates["grid.x"]))

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, context: TensorDict) -> Tensor:
        return self._problem.outer.loss(params, {name: context[name] for name in self._names}, self._batch)
