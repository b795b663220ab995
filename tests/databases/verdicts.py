"""What every exact backend makes of a sample: the right number, a refusal, or a fault."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import fmean
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import HypertorchError
from hypertorch.types import TensorDict
from tests.databases.differences import Difference, central_difference
from tests.databases.implicit_formula import MOST_ENTRIES, NotSharpError, implicit_hypergradient
from tests.databases.problems import FACTORS, LRS, sample_problem, written_out
from tests.databases.samples import Sample

Word: TypeAlias = Literal["right", "refused", "error", "wrong", "PyTorch wrong", "not judged"]
"""`error` is an exception that is not the library's own; `PyTorch wrong` a fault that plain autograd has too."""

TOLERANCE = 1e-6
"""Largest error, relative to the derivative; the differences that it is measured by are ten times as sharp."""

_NOT_SMOOTH = "not smooth here: differences by several step sizes do not agree"
Forward, Implicit, Reverse = ht.hypergradients.Forward, ht.hypergradients.Implicit, ht.hypergradients.Reverse


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to a hypergradient.

    Attributes:
        backend: what computes it.
        one_hparam: in a single hyperparameter.
        route: how two tasks are run; None for a single problem.
    """

    backend: ht.Hypergradient
    one_hparam: bool = False
    route: str | None = None


WAYS: dict[str, Way] = {
    "Reverse()": Way(backend=Reverse()),
    "Reverse(checkpoint_every=1)": Way(backend=Reverse(checkpoint_every=1)),
    "Reverse(derivative='mixed')": Way(backend=Reverse(derivative="mixed")),
    "Forward()": Way(backend=Forward()),
    "Forward(chunk_size=1)": Way(backend=Forward(chunk_size=1)),
    "Forward(), one hyperparameter": Way(backend=Forward(), one_hparam=True),
    "Reverse(), tasks by vmap": Way(backend=Reverse(), route="vmap"),
    "Reverse(), tasks by loop": Way(backend=Reverse(), route="loop"),
    "Implicit(solver=Dense())": Way(
        backend=Implicit(solver=ht.linear_solvers.Dense(), stationarity_tolerance=None, residual_tolerance=None)
    ),
}


class Verdict(NamedTuple):
    """What one way makes of one sample.

    Attributes:
        word: the verdict.
        text: the message of an exception, or what is known of a fault.
        error: relative to the derivative; None where there is no number.
    """

    word: Word
    text: str = ""
    error: float | None = None


def judge(sample: Sample) -> dict[str, Verdict]:
    """Returns the verdict on every way; where the sample has a kink, at a point beside it."""
    with _as_pytorch_tests():
        attempts = ((sample, LRS[0]), (sample, LRS[1]), (sample.moved(1000), LRS[0]), (sample.moved(2000), LRS[1]))
        first = judged = _Judge(*attempts[0])
        for attempt in attempts[1:]:
            if judged.reason_not_to_judge is None:
                break
            judged = _Judge(*attempt)
        if judged.reason_not_to_judge is not None:
            judged = first
        return {name: judged.verdict(way) for name, way in WAYS.items()}


@contextmanager
def _as_pytorch_tests() -> Iterator[None]:
    """Lets operations warn that they are deprecated, and run where none of their kernels is deterministic."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _execution(route: str | None) -> ht.Execution:
    return ht.Execution() if route is None else ht.Execution(tasks=route)  # type: ignore[arg-type]


class _Judge:
    """One sample with what is known of it."""

    def __init__(self, sample: Sample, lr: float) -> None:
        self.sample, self.lr = sample, lr
        self._problems: dict[tuple[bool, str | None], ht.BilevelProblem] = {}
        self._known: dict[Hashable, dict[str, Difference]] = {}

    def verdict(self, way: Way) -> Verdict:
        if self.reason_not_to_judge is not None:
            return Verdict("not judged", self.reason_not_to_judge)
        if isinstance(way.backend, Implicit) and self.sample.num_entries > MOST_ENTRIES:
            return Verdict("not judged", "too large for a Hessian to be written out")
        problem = self._problem(way.one_hparam, way.route)
        try:
            result = ht.hypergradient(
                problem, problem.init_hparams(), backend=way.backend, execution=_execution(way.route)
            )
        except HypertorchError as error:
            return Verdict("refused", str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is written down
            return Verdict("error", f"{type(error).__name__}: {error}")
        if isinstance(way.backend, Implicit):
            return self._of_implicit(problem, result)
        error = _error(result.grads, self.expected(way.route))
        if error is None:
            return Verdict("not judged", _NOT_SMOOTH)
        if error <= TOLERANCE:
            return Verdict("right", error=error)
        return self._fault(error)

    def _problem(self, one_hparam: bool = False, route: str | None = None) -> ht.BilevelProblem:
        key = one_hparam, route
        if key not in self._problems:
            self._problems[key] = sample_problem(self.sample, lr=self.lr, one_hparam=one_hparam, route=route)
        return self._problems[key]

    def expected(self, route: str | None = None) -> dict[str, Difference]:
        """Returns the hypergradient by differences, of a single problem or of tasks."""
        if self.sample.is_random:  # whose noise the library seeds
            problem = self._problem(route=route)
            return self._differences(
                route,
                lambda hparams: ht.unroll(problem, hparams, execution=_execution(route)).outer_loss.mean(),
            )
        problem = self._problem()
        tasks = [
            self._differences(factor, partial(written_out, problem, factor=factor))
            for factor in (FACTORS if route is not None else FACTORS[:1])
        ]
        return {
            name: Difference(fmean(task[name].value for task in tasks), fmean(task[name].error for task in tasks))
            for name in tasks[0]
        }

    def _differences(self, key: Hashable, outer_loss: Callable[[TensorDict], Tensor]) -> dict[str, Difference]:
        if key not in self._known:
            hparams = self._problem().init_hparams()

            def along(name: str, distance: float) -> float:
                return float(outer_loss({**hparams, name: hparams[name] + distance}))

            self._known[key] = {name: central_difference(partial(along, name)) for name in hparams}
        return self._known[key]

    @cached_property
    def reason_not_to_judge(self) -> str | None:
        """Why no derivative can be told here."""
        if self.sample.undefined:
            return self.sample.undefined
        try:
            if self.sample.rounds:
                return "rounds to a lower precision"
            expected = self.expected()
        except Exception as error:  # noqa: BLE001 - an operation that cannot even be trained with
            return f"does not run: {type(error).__name__}: {str(error).splitlines()[0]}"
        values = [difference.value for difference in expected.values()]
        if not all(torch.tensor(values).isfinite()):
            return "not finite here"
        if not all(difference.is_sharp for difference in expected.values()):
            return _NOT_SMOOTH
        return None

    def _fault(self, error: float) -> Verdict:
        text = f"off by {error:.1e}"
        if self.sample.is_random:
            return Verdict("wrong", text, error)
        problem = self._problem()
        leaves = {name: value.requires_grad_() for name, value in problem.init_hparams().items()}
        gradient = torch.autograd.grad(written_out(problem, leaves, graph=True), list(leaves.values()))
        by_plain = _error(dict(zip(leaves, gradient, strict=True)), self.expected())
        if by_plain is not None and by_plain > TOLERANCE:
            return Verdict("PyTorch wrong", f"{text}; plain autograd by {by_plain:.1e}", error)
        return Verdict("wrong", text, error)

    def _of_implicit(self, problem: ht.BilevelProblem, result: ht.HypergradientResult) -> Verdict:
        if self.sample.is_random:
            return Verdict("not judged", "noise: the formula is not written out with it")
        try:
            expected = implicit_hypergradient(problem, result.params, list(self.sample.start))
        except NotSharpError as error:
            return Verdict("not judged", str(error))
        error = _error(result.grads, expected)
        if error is None:
            return Verdict("not judged", _NOT_SMOOTH)
        return Verdict("right", error=error) if error <= TOLERANCE else Verdict("wrong", f"off by {error:.1e}", error)


def _error(found: TensorDict, expected: dict[str, Difference]) -> float | None:
    """Returns the largest relative error; None where differences are not sharp enough to tell."""
    errors = []
    for name, value in found.items():
        difference = expected[name]
        if not difference.is_sharp:
            return None
        errors.append(abs(float(value) - difference.value) / max(abs(difference.value), 1e-300))
    return max(errors)
