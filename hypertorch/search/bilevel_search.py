"""Searches the hyperparameters of a bilevel problem, from its hypergradients too."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import is_count
from hypertorch.errors import NonFiniteError
from hypertorch.hypergradients import Hypergradient, hypergradient
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.outer.fingerprint import described, problem_settings
from hypertorch.outer.steps.constraining import match_constraints
from hypertorch.outer.storage.one_writer import one_writer
from hypertorch.problem import BilevelProblem
from hypertorch.search.gradient_bayes import LARGEST, GradientBayes
from hypertorch.search.kernels import Kernel, Matern52
from hypertorch.search.scale import check_pair
from hypertorch.search.search_file import SearchFile
from hypertorch.types import TensorDict
from hypertorch.unroll import unroll


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """One training run of a search.

    Attributes:
        hparams: the outer variables, those that are not searched among them.
        outer_loss: NaN, or beyond 1e100, if the run diverged.
        grads: the hypergradient in what is searched; empty if none was asked for, or the run diverged.
    """

    hparams: TensorDict
    outer_loss: float
    grads: TensorDict

    @property
    def failed(self) -> bool:
        """Whether the run diverged: its outer loss or its hypergradient was NaN, infinite or beyond 1e100."""
        return not abs(self.outer_loss) < LARGEST


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """What a search found, and what it cost.

    Attributes:
        evaluations: in their order.
        num_with_gradients: evaluations that computed a hypergradient, failed ones among them.
        num_without_gradients: evaluations that ran the inner loop alone.
        gradients_used: whether the last process was conditioned on the gradients; False where they predicted left-out
            values worse than none.
    """

    evaluations: tuple[Evaluation, ...]
    num_with_gradients: int
    num_without_gradients: int
    gradients_used: bool

    @property
    def best(self) -> Evaluation:
        """The evaluation with the least outer loss.

        Raises:
            ValueError: if all of them failed.
        """
        succeeded = [evaluation for evaluation in self.evaluations if not evaluation.failed]
        if not succeeded:
            raise ValueError(
                f"all {len(self.evaluations)} evaluations diverged, so none is the best. Narrow `bounds`, or train "
                "with a smaller learning rate."
            )
        return min(succeeded, key=lambda evaluation: evaluation.outer_loss)

    @property
    def best_so_far(self) -> list[float]:
        """The least outer loss after each evaluation; infinity before the first that succeeded."""
        least, found = math.inf, []
        for evaluation in self.evaluations:
            least = least if evaluation.failed else min(least, evaluation.outer_loss)
            found.append(least)
        return found


@typed("execution")
def minimise(
    problem: BilevelProblem,
    bounds: Mapping[str, tuple[float, float]],
    *,
    backend: Hypergradient | None,
    num_evaluations: int,
    log: Collection[str] = (),
    num_initial: int = 5,
    kernel: Kernel = Matern52(),  # noqa: B008 (frozen)
    guarded: bool = True,
    seed: int = 0,
    file: str | Path | None = None,
    execution: Execution = DEFAULT,
) -> SearchResult:
    """Returns the result of Bayesian optimisation of the outer loss, conditioned on its values and hypergradients.

    Each evaluation is a training run with hyperparameters that `GradientBayes` chooses. A run that diverges is a
    failed evaluation, and the search goes on. Use it where the outer loss has many minima, or a wide range must be
    searched: `ht.OuterLoop` follows the hypergradient from one start, and takes any number of hyperparameters.

    Cost: `num_evaluations` hypergradients, or runs of the inner loop where `backend` is None, and of each choice that
    of `GradientBayes.ask`.

    Args:
        problem: the problem, at outer step 0.
        bounds: least and greatest value of each entry of the hyperparameters that are searched, by name; 1 to 20
            entries in all. The others stay at `problem.init_hparams()`.
        backend: how the hypergradient is computed; None to search by values alone.
        num_evaluations: in all, those that `file` has among them.
        log: names that are searched by their logarithm.
        num_initial: evaluations at points of a Sobol sequence, before a process is fitted.
        kernel: of the process.
        guarded: whether gradients that predict left-out values worse than none are left aside.
        seed: of the search.
        file: written after each evaluation (safetensors). If it exists, its evaluations are read instead of run, and
            the search goes on as if it had not been interrupted. The settings of the search are compared with the
            file's, and of the problem its classes, dynamics, horizon and what is not searched; not its data and code.
        execution: how the problem is run.

    Raises:
        ValueError: if `bounds` or `log` name what the problem does not have, a bound is outside a constraint, there are
            more than 20 entries, the problem is warm-started, or a count is none.
        TypeError: if an argument is of the wrong kind.
        CheckpointError: if `file` is damaged or of another search.
        ImportError: if BoTorch is not installed.
    """
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            f"`problem` is a {type(problem).__name__}, not a `BilevelProblem`: the search runs one problem again and "
            "again. Pass `source.at(outer_step)` if you have a `ProblemSource`."
        )
    if file is not None and not isinstance(file, (str, Path)):
        raise TypeError(f"`file` is {file!r}, which is no path. Pass for example 'search.safetensors', or None.")
    if not is_count(num_evaluations):
        raise ValueError(
            f"`num_evaluations` is {num_evaluations!r}, which is no count. Pass a whole number of at least 1."
        )
    if problem.warm_start:
        raise ValueError(
            "`warm_start` of the problem is True, but each evaluation of a search is a run of its own, which nothing "
            "comes before. Pass a problem with `warm_start=False`."
        )
    searched = _Searched(problem, bounds, log)
    search = GradientBayes(
        searched.bounds, log=searched.log, num_initial=num_initial, kernel=kernel, guarded=guarded, seed=seed
    )
    # Everything that the choice of the points depends on.
    settings = {
        "bounds": repr(searched.described),
        "search": repr((num_initial, kernel, guarded, seed)),
        "inner_dtype": repr(execution.inner_dtype),
        **described({"backend": backend, "fixed": searched.fixed}),
        **problem_settings(problem),
    }
    path = None if file is None else Path(file).absolute()
    with nullcontext() if path is None else one_writer(path.parent, path.name):
        record = SearchFile(path, settings, len(searched.bounds))
        return _searched(problem, searched, search, record, backend, num_evaluations, execution)


def _searched(
    problem: BilevelProblem,
    searched: _Searched,
    search: GradientBayes,
    record: SearchFile,
    backend: Hypergradient | None,
    num_evaluations: int,
    execution: Execution,
) -> SearchResult:
    """Returns what the search found when it has as many evaluations as are asked for."""
    for point, value, gradient in zip(record.points, record.values, record.gradients, strict=True):
        search.tell(point[None], value[None], None if backend is None else gradient[None])
    while len(record.points) < num_evaluations:
        point = search.ask()
        value, gradient = _evaluate(problem, searched, searched.hparams(point[0]), backend, execution)
        search.tell(point, value[None], None if backend is None else gradient[None])
        record.add(point[0], value, gradient)
    evaluations = tuple(
        Evaluation(
            hparams=searched.hparams(point),
            outer_loss=float(value),
            grads=searched.named(gradient) if backend is not None and bool(value.isfinite()) else {},
        )
        for point, value, gradient in zip(record.points, record.values, record.gradients, strict=True)
    )
    with_gradients = 0 if backend is None else len(evaluations)
    return SearchResult(
        evaluations=evaluations,
        num_with_gradients=with_gradients,
        num_without_gradients=len(evaluations) - with_gradients,
        gradients_used=search.uses_gradients,
    )


def _evaluate(
    problem: BilevelProblem,
    searched: _Searched,
    hparams: TensorDict,
    backend: Hypergradient | None,
    execution: Execution,
) -> tuple[Tensor, Tensor]:
    """Returns the outer loss and its gradient in what is searched; NaN for what diverged or is not computed."""
    unknown = torch.full((len(searched.bounds),), torch.nan, dtype=torch.float64)
    if backend is None:
        loss = unroll(problem, hparams, execution=execution).outer_loss.mean().to("cpu", torch.float64)
        return torch.where(loss.isfinite(), loss, torch.nan), unknown
    try:
        result = hypergradient(problem, hparams, backend=backend, execution=execution)
    except NonFiniteError:
        return unknown[0], unknown
    return result.outer_loss.to("cpu", torch.float64), searched.flat(result.grads)


class _Searched:
    """The hyperparameters that are searched, as one vector, in the order of the problem.

    Attributes:
        bounds: of each entry.
        log: whether each entry is searched by its logarithm.
    """

    def __init__(
        self, problem: BilevelProblem, bounds: Mapping[str, tuple[float, float]], log: Collection[str]
    ) -> None:
        self._start = {name: value.detach() for name, value in problem.init_hparams().items()}
        if isinstance(log, str) or not isinstance(log, Collection) or not all(isinstance(name, str) for name in log):
            raise TypeError(f"`log` is {log!r}, but it lists names. Pass a tuple of them, such as `('lr',)`.")
        if not isinstance(bounds, Mapping):
            raise TypeError(f"`bounds` is {bounds!r}, which has no names. Pass for example `{{'lr': (0.01, 1.0)}}`.")
        _check_names("bounds", bounds, self._start, "hyperparameters of the problem")
        _check_names("log", log, bounds, "what `bounds` names")
        self._names = [name for name in self._start if name in bounds]
        self.bounds = [bounds[name] for name in self._names for _ in range(self._start[name].numel())]
        self.log = [name in log for name in self._names for _ in range(self._start[name].numel())]
        for name in self._names:
            check_pair(f"bounds[{name!r}]", bounds[name])
            if self._start[name].element_size() < 4:
                raise TypeError(
                    f"`{name}` has dtype {self._start[name].dtype}, in which many points of a search are one number. "
                    "Search it in float32 or float64."
                )
        for name, constraint in match_constraints(self._names, chosen={}, problem=problem).items():
            # A convex set that holds the two corners of the box is one of bounds on entries or on their sum, and holds
            # the box.
            for bound in bounds[name]:
                if not constraint.feasible(torch.full_like(self._start[name], bound)):
                    raise ValueError(
                        f"`bounds` of `{name}` are {bounds[name]}, but its constraint {constraint} excludes {bound} "
                        "for every entry: the search would train with what the problem forbids. Narrow the bounds."
                    )

    @property
    def fixed(self) -> TensorDict:
        """The outer variables that are not searched."""
        return {name: value for name, value in self._start.items() if name not in self._names}

    @property
    def described(self) -> list[tuple[str, str, tuple[int, ...], bool, tuple[float, float]]]:
        """Name, dtype, shape, switch of the logarithm and bounds of each hyperparameter."""
        ends = dict(zip(self._entries(), zip(self.log, self.bounds, strict=True), strict=True))
        return [
            (name, str(self._start[name].dtype), tuple(self._start[name].shape), *ends[name]) for name in self._names
        ]

    def _entries(self) -> list[str]:
        return [name for name in self._names for _ in range(self._start[name].numel())]

    def hparams(self, point: Tensor) -> TensorDict:
        """Returns the outer variables of the problem with those of a point among them, in their own dtype."""
        named = self.named(point)
        return {name: named.get(name, value).to(value) for name, value in self._start.items()}

    def named(self, vector: Tensor) -> TensorDict:
        """Returns the parts of a vector, shape `(entries,)`, by the names of the hyperparameters."""
        sizes = [self._start[name].numel() for name in self._names]
        parts = vector.split(sizes)
        return {name: part.reshape(self._start[name].shape) for name, part in zip(self._names, parts, strict=True)}

    def flat(self, grads: TensorDict) -> Tensor:
        """Returns the entries of what is searched as one vector, float64, on the host."""
        return torch.cat([grads[name].detach().to("cpu", torch.float64).flatten() for name in self._names])


def _check_names(argument: str, names: Collection[str], known: Mapping[str, object], remedy: str) -> None:
    unknown = sorted(set(names) - known.keys())
    if unknown:
        raise ValueError(
            f"`{argument}` names {unknown}, which are none of {sorted(known)}: there is nothing to search there. Name "
            f"{remedy}."
        )
