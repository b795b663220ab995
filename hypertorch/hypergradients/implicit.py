"""Implicit differentiation of the inner solution, without unrolling the run that found it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.products import vjp
from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_kind
from hypertorch.errors import IncompatibleBackendError, LinearSolveWarning, NonFiniteError
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.reverse_mode.sweep import outer_part
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.solution import map_loss, map_step
from hypertorch.inner.state import InnerState
from hypertorch.linear_solvers import ConjugateGradient, FixedPoint, LinearSolution, LinearSolver, SymmetricSolver
from hypertorch.types import TensorDict

ImplicitMap: TypeAlias = Literal["gradient", "step"]
"""Which equation the inner solution solves: a gradient that is zero, or a step that changes nothing."""

_BUFFER = "\0buffer"  # starts the names of the optimiser's buffers, which no param has
_MENDS = (
    "Lower the step size of `Neumann` or `FixedPoint` below 2 over the largest eigenvalue of the curvature; where the "
    "curvature is not positive definite, use `ConjugateGradient(damping=...)` above its most negative eigenvalue, take "
    "more inner steps, or use `Dense()` for a small problem"
)
_SCALE = "stationarity"  # starts the names of what the next outer step of a warm-started run needs


@dataclass(frozen=True, kw_only=True)
class Implicit(Hypergradient):
    """The hypergradient at the inner solution by the implicit function theorem; the run that led there plays no role.

    The inner solution `s` is the root of an equation `F(s, hparams) = 0`. With `q` from one linear system,

        (dF/ds)' q = dE/ds,   df/dhparams = dE/dhparams - q' dF/dhparams

    - `map="gradient"`: `F = dL/dw`, and `dF/ds = d2L/dw2` is symmetric. The rule of the dynamics plays no role, so a
      hyperparameter of it (a step size, or a weight decay that is no term of the loss) has no path.
    - `map="step"`: `F = s - Phi(s, hparams)` over params and the optimiser's buffers, with the rule of the last step.
      Not symmetric: the solver must be one for general systems, for example `FixedPoint()`.

    The data of `F` is `InnerProblem.full_batch`, or that of the last inner step. Running statistics, and params that
    the inner loss does not use, are constants of it. The initialisation is forgotten: a hyperparameter that acts
    through it alone is refused, the initialisation's part of one that acts otherwise too is dropped. With
    `num_steps=0`, `init_params` is taken as the solution, and not judged: it must be the minimum of the inner loss.

    Two figures of the result say how much to trust it, each of shape `()` or `(tasks,)`:

    - `linear_residual`: `|(dF/ds)' q - dE/ds| / |dE/ds|`.
    - `stationarity`: how much of the way to the solution is left, absent if `num_steps` is 0. It is `|dL/dw|` at the
      last params over that at the first; with `map="step"`, the length of one more step over that of the first step,
      buffers included. Of a warm-started run, the first of all its outer steps with the largest counts.

    Cost: `num_steps` steps, two more, and a vjp of one step for every product that the solver asks for, plus one.
    Memory: one state and the graph of one step (that of a gradient), whatever `num_steps` is, and the solver's own.

    Args:
        solver: of the linear system; None for `ConjugateGradient()`, or `FixedPoint()` with `map="step"`.
        map: which equation the inner solution solves.
        residual_tolerance: `linear_residual` above which a `LinearSolveWarning` is issued; None for no warning.
        stationarity_tolerance: the same for `stationarity`.

    Raises:
        ValueError: if `map` is an unknown word or a tolerance is negative.
        TypeError: if `solver` is no `LinearSolver`.
        IncompatibleBackendError: if `map="step"` meets a solver for symmetric systems; (from `compute`) if the outer
            loss has terms at inner steps, or the inner loss is linear in its params.
        NonFiniteError: (from `compute`) if the solver diverges until it overflows.

    References:
        Domke (2012), Generic methods for optimization-based modeling; Pedregosa (2016), Hyperparameter
        optimization with approximate gradient, algorithm 1; Rajeswaran, Finn, Kakade and Levine (2019), Meta-learning
        with implicit gradients, algorithm 2; Grazzi, Franceschi, Pontil and Salzo (2020), On the iteration complexity
        of hypergradient computation, algorithm 2 (`map="step"`).
    """

    solver: LinearSolver | None = None
    map: ImplicitMap = "gradient"
    residual_tolerance: float | None = 1e-3
    stationarity_tolerance: float | None = 1e-2

    def __post_init__(self) -> None:
        check_fields(self, "residual_tolerance", "stationarity_tolerance")
        if self.solver is None:
            # This sets a field of a frozen class: the default depends on `map`.
            object.__setattr__(self, "solver", FixedPoint() if self.map == "step" else ConjugateGradient())
        why = (
            "the hypergradient rests on the solution of a linear system. Pass an instance, for example "
            "`ConjugateGradient()`."
        )
        check_kind("`solver`", self.solver, LinearSolver, why)
        if self.map not in ("gradient", "step"):
            raise ValueError(
                f"`map` is {self.map!r}, which names no equation of the inner solution. Use 'gradient' or 'step'."
            )
        if self.map == "step" and isinstance(self.solver, SymmetricSolver):
            raise IncompatibleBackendError(
                f"`solver` is {self.solver!r} with `map='step'`: the derivative of a step in a state with buffers is "
                "not symmetric, and this solver answers wrongly for such systems. Use `FixedPoint()`, `Neumann()` or, "
                "for small problems, `Dense()`; or `map='gradient'`."
            )
        _check_tolerance("residual_tolerance", self.residual_tolerance)
        _check_tolerance("stationarity_tolerance", self.stationarity_tolerance)

    @property
    def _solver(self) -> LinearSolver:
        assert self.solver is not None
        return self.solver

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the derivative of the outer loss in `variables` at the inner solution, direct term included."""
        if loop.has_terms:
            raise IncompatibleBackendError(
                "`Implicit` got an outer problem with `step_loss`: terms at inner steps are about the way to the "
                "solution, which implicit differentiation forgets. Use `Reverse()`, or judge the last params alone."
            )
        # Values alone: the way to the solution is not differentiated, and no graph grows with it.
        last, first_size = self._run(loop, tree.detach(variables))
        # dE/dhparams, the direct term, and dE/ds at the last state.
        grads, cotangents, outer_loss = outer_part(loop, variables, last)
        equation = self._equation(loop, variables, last)
        by_name = dict(zip(last.names(), cotangents, strict=True))
        # (dF/ds)' q = dE/ds, of which the part of the optimiser's buffers is zero: E does not read them.
        solved = _solve(loop, equation, {name: by_name[name] for name in loop.trained(last.params)}, self._solver)
        # df/dhparams = dE/dhparams - q' dF/dhparams.
        grads = tree.accumulate(grads, _through(loop, equation, solved.solution, variables))
        loop.record.hold(1)

        figures = {"linear_residual": solved.residual}
        carry: TensorDict = {}
        if first_size is not None:
            left = tree.norm(tree.detach(equation.values), tasks_axis=loop.has_tasks_axis)
            figures["stationarity"] = _ratio(left, first_size)
            carry = {f"{_SCALE}.first": first_size} if loop.problem.warm_start else {}
        self._warn(figures, solved.iterations)
        return BackendResult(grads=grads, outer_loss=outer_loss, state=last.detached(), figures=figures, carry=carry)

    def _run(self, loop: InnerLoop, constants: TensorDict) -> tuple[InnerState, Tensor | None]:
        """Returns the last state, and `|F|` where the run began, `()` or `(tasks,)`; None if there is no step."""
        with torch.no_grad():
            state = loop.initial(constants)
            if loop.num_steps == 0:
                return state, None
            # A warm-started run begins near its solution: how far it has
            # come is measured from where the first one began.
            sizes = list(loop.carried(_SCALE).values())
            if self.map == "gradient":
                gradient = _gradient(loop, loop.trained(state.params), constants, state)
                sizes.append(tree.norm(gradient, tasks_axis=loop.has_tasks_axis))

            def advance(before: InnerState, step: int) -> InnerState:
                after = loop.advance(before, constants, step)
                if step == 0 and self.map == "step":
                    moved = _difference(_moving(loop, before), _moving(loop, after))
                    sizes.append(tree.norm(moved, tasks_axis=loop.has_tasks_axis))
                return after

            state = scan(advance, state, range(loop.num_steps))
            return state, torch.stack(sizes).amax(0)

    def _equation(self, loop: InnerLoop, variables: TensorDict, last: InnerState) -> _Equation:
        """Returns the equation at the last state."""
        # Running statistics stay constants of the equation.
        params = tree.leaves_requiring_grad(loop.trained(last.params))
        fixed = InnerState({**tree.detach(last.params), **params}, last.dynamics)
        with torch.enable_grad():
            if self.map == "gradient":
                values = _gradient(loop, params, variables, fixed)
                # Where the gradient has no graph the loss is linear, or does not use the param.
                return _Equation(values, params, frozenset(name for name in values if values[name].requires_grad))
            # Without a step no buffers of the optimiser were made.
            dynamics = last.dynamics if loop.num_steps else loop.dynamics.init(params, variables)
            state = fixed._replace(dynamics=tree.leaves_requiring_grad(dynamics))
            leaves = _moving(loop, state)
            values = _difference(leaves, _moving(loop, map_step(loop, state, variables)))
            # A param that the loss does not use has zeros for its row of dF/ds, which would make the system singular.
            unknowns = values.keys() - _unused(loop, params, variables, fixed)
        return _Equation(values, leaves, frozenset(unknowns))

    def _warn(self, figures: TensorDict, iterations: int) -> None:
        # One digit: Python shows a warning of the same text once, and an outer loop comes here at every step.
        residual = _above(figures["linear_residual"], self.residual_tolerance)
        if residual is not None:
            why = (
                f"`{self.solver!r}` left that part of the linear system unsolved, and the hypergradient is off by it "
                "or more. Give it more iterations, a step size or damping that suits the curvature, or use another "
                "solver"
                if residual <= 1.0
                else f"after {iterations} iterations `{self.solver!r}` is farther from the solution than zero is, and "
                f"the hypergradient means nothing. If it diverges, more iterations make it worse. {_MENDS}"
            )
            warnings.warn(
                LinearSolveWarning(
                    f"`linear_residual` is {residual:.0e}, above `residual_tolerance` = {self.residual_tolerance}: "
                    f"{why}; `residual_tolerance=None` accepts it.",
                    residual,
                ),
                stacklevel=2,
            )
        stationarity = _above(figures.get("stationarity"), self.stationarity_tolerance)
        if stationarity is not None:
            warnings.warn(
                LinearSolveWarning(
                    f"`stationarity` is {stationarity:.0e}, above `stationarity_tolerance` = "
                    f"{self.stationarity_tolerance}: the inner run ended where `map={self.map!r}` has no solution yet, "
                    "and the hypergradient is that of another point. Take more inner steps; use `map='step'` if the "
                    "dynamics add what is no part of the loss (weight decay), or an unrolling backend such as "
                    "`Reverse()`; `stationarity_tolerance=None` accepts it.",
                    stationarity,
                ),
                stacklevel=2,
            )


class _Equation(NamedTuple):
    """`F(s, hparams)` with its graph.

    Attributes:
        values: `F`, named by the tensors of the state that it is as large as.
        state: the state that it was evaluated at, as leaves.
        unknowns: names of the tensors of the state that the equation determines; the others are constants.
    """

    values: TensorDict
    state: TensorDict
    unknowns: frozenset[str]


def _gradient(loop: InnerLoop, params: TensorDict, variables: TensorDict, state: InnerState) -> TensorDict:
    """Returns `dL/dw` for the data of the inner solution, with a graph where grad mode is on."""
    loss = map_loss(loop, state)
    gradient = loss.gradient(params, variables)
    loop.record.add_step(None, tracked_buffers=loss.tracked_buffers)
    return gradient


def _unused(loop: InnerLoop, params: TensorDict, variables: TensorDict, state: InnerState) -> set[str]:
    """Returns the params that the inner loss does not use: no equation determines them."""
    value = map_loss(loop, state)(params, variables)
    loop.record.add_step(None)
    found = vjp([value], [torch.ones_like(value)], params)
    return {name for name, slope in found.items() if slope is None}


def _moving(loop: InnerLoop, state: InnerState) -> TensorDict:
    """Returns the trained params and the optimiser's buffers, as far as they have derivatives, in one dictionary."""
    tensors = {**loop.trained(state.params), **tree.with_prefix(_BUFFER, state.dynamics)}
    return {name: value for name, value in tensors.items() if tree.is_differentiable(value)}


def _difference(left: TensorDict, right: TensorDict) -> TensorDict:
    """Returns `left - right`; an optimiser may make buffers in its first step, which are left out."""
    return {name: value - right[name] for name, value in left.items() if name in right}


def _solve(
    loop: InnerLoop, equation: _Equation, cotangents: dict[str, Tensor | None], solver: LinearSolver
) -> LinearSolution:
    """Returns `q` with `(dF/ds)' q = dE/ds`, where there is a path to it."""
    names = _support(loop, equation, cotangents)
    values = [equation.values[name] for name in names]
    leaves = {name: equation.state[name] for name in names}
    if not names:
        empty = tree.norm(tree.detach(equation.values), tasks_axis=loop.has_tasks_axis)
        return LinearSolution(solution={}, residual=torch.zeros_like(empty), iterations=0)

    def matvec(vector: TensorDict) -> TensorDict:
        loop.record.add_vjps(1, graph_steps=1)
        # One graph for all iterations of the solver. A path that is missing is a zero to it.
        product = vjp(values, [vector[name] for name in names], leaves, retain_graph=True)
        return {name: _or_zeros(product[name], leaf) for name, leaf in leaves.items()}

    rhs = {name: _or_zeros(cotangents.get(name), leaf.detach()) for name, leaf in leaves.items()}
    solved = solver.solve(matvec, rhs, tasks_axis=loop.has_tasks_axis)
    # What is not finite in the system itself comes from the run, which the front door explains.
    if not tree.all_finite([solved.residual]) and tree.all_finite([*rhs.values(), *matvec(rhs).values()]):
        raise NonFiniteError(
            f"the linear system of the hypergradient: `{solver!r}` diverged, with a `linear_residual` of "
            f"{float(solved.residual.max())} after {solved.iterations} iterations, although the system is finite. "
            f"{_MENDS}."
        )
    return solved


def _support(loop: InnerLoop, equation: _Equation, cotangents: dict[str, Tensor | None]) -> list[str]:
    """Returns the names of the unknowns that reach the outer loss, directly or through the equation of others.

    The entries of `q` elsewhere are exact zeros. They are left out, so that a hyperparameter without effect gets None,
    as in reverse mode, and is noticed.

    Cost: nothing where the outer loss reads all of the state; else a vjp for every step of the way through it.
    """
    reached = {name for name, value in cotangents.items() if value is not None} & equation.unknowns
    if any(value is not None for value in cotangents.values()) and not equation.unknowns:
        raise IncompatibleBackendError(
            "`InnerProblem.loss` is linear in its params, or uses none of them at the last one: it has no minimum, so "
            "there is no solution to differentiate. Add a term that bounds it (such as a small L2 penalty), or use "
            "`Reverse()`."
        )
    found: set[str] = set()
    while reached != found and reached != equation.unknowns:
        found = reached
        values = [equation.values[name] for name in found]
        loop.record.add_vjps(1, graph_steps=1)
        # The cotangents are zeros: the question is which paths there are, not what their values are.
        paths = vjp(values, [torch.zeros_like(value) for value in values], equation.state, retain_graph=True)
        reached = found | ({name for name, value in paths.items() if value is not None} & equation.unknowns)
    return [name for name in equation.state if name in reached]


def _through(
    loop: InnerLoop, equation: _Equation, solution: TensorDict, variables: TensorDict
) -> dict[str, Tensor | None]:
    """Returns `-q' dF/dvariables`."""
    loop.record.add_vjps(1, graph_steps=1)
    # The last product through this graph, which frees it.
    return vjp([equation.values[name] for name in solution], [-value for value in solution.values()], variables)


def _or_zeros(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _ratio(left: Tensor, size: Tensor) -> Tensor:
    """Returns `left / size`; 0 where both are zero."""
    return torch.where(left == 0, 0.0, left / size)


def _above(figure: Tensor | None, tolerance: float | None) -> float | None:
    """Returns the largest of a figure, if it is above the tolerance; NaN is the front door's to report."""
    if figure is None or tolerance is None:
        return None
    largest = float(figure.max())
    return largest if largest > tolerance else None


def _check_tolerance(name: str, value: float | None) -> None:
    if value is not None and not value >= 0.0:
        raise ValueError(
            f"`{name}` is {value!r}: it is compared with a relative size, which is never below 0. Pass a number of at "
            "least 0, or None for no warning."
        )
