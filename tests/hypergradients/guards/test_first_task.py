"""What is noticed of a function that changes its arguments, or does not return the same again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import NonFiniteError, ReplayError
from hypertorch.hypergradients.guards import first_task
from hypertorch.hypergradients.guards.finiteness import non_finite_hypergradient
from hypertorch.hypergradients.guards.first_task import arguments_kept
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, scalars


def replaced(values: TensorDict) -> None:
    values["a"] = values["a"].clone()  # equal, and another tensor


def added(values: TensorDict) -> None:
    values["b"] = torch.zeros(2)


def removed(values: TensorDict) -> None:
    del values["a"]


def moved(values: TensorDict) -> None:
    values["a"].add_(1.0)


@pytest.mark.parametrize("change", [replaced, added, removed, moved])
def test_every_change_of_an_argument_is_named(change: Callable[[TensorDict], None]) -> None:
    values = {"a": torch.tensor([1.0, float("nan")])}
    name = "b" if change is added else "a"
    with (
        pytest.raises(ReplayError, match=rf"`f` changes its argument `values\['{name}'\]`"),
        arguments_kept("f", values=values),
    ):
        change(values)


def test_an_argument_that_is_left_as_it_is_is_no_change() -> None:
    with arguments_kept("f", values={"a": torch.tensor([1.0, float("nan")])}):
        pass


def test_a_first_state_that_counts_its_calls_is_noticed() -> None:
    calls: list[int] = []

    def init(hparams: TensorDict) -> TensorDict:
        calls.append(1)
        return {"w": hparams["c"] + len(calls)}

    problem = ht.BilevelProblem(
        # The step forgets where it came from, so that nothing after it tells.
        LambdaInner(init, lambda p, h, b: p["w"].square() / 2),
        LambdaOuter({"c": torch.ones((), dtype=torch.float64)}, lambda p, h, b: p["w"] + h["c"]),
        dynamics=ht.dynamics.SGD(lr=1.0),
        num_steps=1,
    )
    with pytest.raises(ReplayError, match="`InnerProblem.init_params` differs"):
        ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse())


def test_where_infinity_appeared_is_told_of_a_problem_with_a_context() -> None:
    def context(hparams: TensorDict, batch: Batch) -> TensorDict:
        return {"target": 2.0 * hparams["c"]}

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - hparams["target"]).square().square()

    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.full((), 1e3, dtype=torch.float64)}, loss),
        LambdaOuter({"c": torch.ones((), dtype=torch.float64)}, lambda p, h, b: p["w"]),
        dynamics=ht.dynamics.SGD(lr=1.0),
        num_steps=8,
        context=context,
    )
    with pytest.raises(NonFiniteError, match="inner step"):
        ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse())


def test_an_infinite_hypergradient_is_told_with_the_worst_figure() -> None:
    grads = {"a": torch.zeros(2), "b": torch.tensor([0.0, float("inf")])}
    figures = {"linear_residual": torch.tensor([1e-9, 2.0, 0.5])}
    error = str(non_finite_hypergradient(grads, figures))
    assert error.startswith("the hypergradient of `b` is not finite")
    assert "Of its own accuracy the backend reports `linear_residual` = 2e+00." in error
    assert "Of its own" not in str(non_finite_hypergradient(grads, {}))


class Terms(LambdaOuter):
    """Judges every step, and notes which."""

    def __init__(self, seen: set[int]) -> None:
        super().__init__(scalars(c=1.0), lambda p, h, b: p["w"].square() + h["c"])
        self.seen = seen

    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        self.seen.add(int(index))
        return params["w"].square()


class Drawing(LambdaInner):
    """Draws data of every step, and notes which."""

    def __init__(self, seen: set[int]) -> None:
        super().__init__(lambda h: {"w": h["c"] * 2.0}, lambda p, h, b: (p["w"] - h["c"] * b).square())
        self.seen = seen

    def batch(self, step: int) -> Batch:
        self.seen.add(int(step))
        return torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize(
    "backend",
    [
        ht.hypergradients.Reverse(),
        ht.hypergradients.Reverse(checkpoint_every=1),
        ht.hypergradients.Reverse(derivative="mixed"),
        ht.hypergradients.Forward(),
        ht.hypergradients.Truncated(window=2),
        ht.hypergradients.EvolutionStrategies(num_pairs=1, sigma=0.1),
    ],
    ids=repr,
)
def test_no_function_is_asked_for_a_step_outside_of_the_horizon(backend: ht.Hypergradient) -> None:
    drawn: set[int] = set()
    judged: set[int] = set()
    problem = ht.BilevelProblem(Drawing(drawn), Terms(judged), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=3)
    ht.hypergradient(problem, problem.init_hparams(), backend=backend)
    assert drawn == judged == {0, 1, 2}


NAN = float("nan")


@pytest.mark.parametrize(
    ("before", "after", "is_kept"),
    [([1.0, NAN], [1.0, NAN], True), ([1.0, 2.0], [1.0, NAN], False), ([1.0, NAN], [1.0, 2.0], False)],
)
def test_nan_that_was_there_is_no_change_and_any_other_is(
    before: list[float], after: list[float], is_kept: bool
) -> None:
    value = torch.tensor(before)
    kept = {"w": (value, value.clone())}
    value.copy_(torch.tensor(after))
    assert first_task._is_kept({"w": value}, "w", kept) is is_kept
