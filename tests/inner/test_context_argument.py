"""The context as an argument of its own: the same numbers, and hparams that are the outer variables alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import normal

backends = ht.hypergradients
SEEN: list[tuple[str, frozenset[str], frozenset[str]]] = []
INPUTS, TARGETS = normal(3, 6, 2, seed=1), normal(3, 6, seed=2)


def note(method: str, hparams: TensorDict, context: TensorDict) -> None:
    SEEN.append((method, frozenset(hparams), frozenset(context)))


class Fit(ht.InnerProblem):
    """A head on features, by least squares with a learnt penalty; the context is among the hparams."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["features"].mean(dim=0) * hparams["shared"]}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        errors = hparams["features"] @ params["w"] - hparams["targets"]
        return errors.square().mean() + hparams["l2"] * params["w"].square().sum()


class Judge(ht.OuterProblem):
    """Judges on the same features, at each step and at the end."""

    def init_hparams(self) -> TensorDict:
        return {"map": normal(2, 2, seed=3), "l2": torch.tensor(0.1, dtype=torch.float64)}

    def batch(self, outer_step: int) -> Batch:
        return INPUTS, TARGETS

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (hparams["features"] @ params["w"] - batch[1]).abs().mean() + hparams["l2"]

    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return (index + 1) * (hparams["features"] @ params["w"]).square().mean()

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        return {"size": (hparams["features"] @ params["w"]).abs().mean()}


class FitApart(Fit):
    """The same, with the context apart."""

    def init_params(self, hparams: TensorDict, context: TensorDict) -> TensorDict:
        note("init_params", hparams, context)
        return super().init_params({**hparams, **context})

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, context: TensorDict) -> Tensor:
        note("loss", hparams, context)
        return super().loss(params, {**hparams, **context}, batch)


class JudgeApart(Judge):
    """The same, with the context apart."""

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, context: TensorDict) -> Tensor:
        note("outer loss", hparams, context)
        return super().loss(params, {**hparams, **context}, batch)

    def step_loss(
        self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int, context: TensorDict
    ) -> Tensor:
        note("step_loss", hparams, context)
        return super().step_loss(params, {**hparams, **context}, batch, index)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch, context: TensorDict) -> TensorDict:
        note("metrics", hparams, context)
        return super().metrics(params, {**hparams, **context}, batch)


def context(hparams: TensorDict, batch: Batch) -> TensorDict:
    inputs, targets = batch
    return {"features": (inputs @ hparams["map"]).tanh(), "targets": targets, "shared": hparams["map"].sum()}


AMONG = ht.BilevelProblem(
    Fit(),
    Judge(),
    dynamics=ht.dynamics.SGD(lr=0.1),
    num_steps=3,
    num_tasks=3,
    context=context,
    shared_context=("shared",),
)
APART = replace(AMONG, inner=FitApart(), outer=JudgeApart())


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize(
    "backend",
    [
        backends.Reverse(),
        backends.Reverse(checkpoint_every=1),
        backends.Reverse(derivative="mixed"),
        backends.Forward(),
        backends.Truncated(window=2),
    ],
    ids=repr,
)
def test_the_numbers_are_those_of_the_context_among_the_hparams(backend: ht.Hypergradient, tasks: str) -> None:
    execution = ht.Execution(tasks=tasks)  # type: ignore[arg-type]
    hparams = AMONG.init_hparams()
    among, apart = (
        ht.hypergradient(problem, hparams, backend=backend, execution=execution) for problem in (AMONG, APART)
    )
    torch.testing.assert_close(apart.grads, among.grads, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apart.outer_loss, among.outer_loss, rtol=1e-12, atol=1e-12)


def test_hparams_are_then_the_outer_variables_alone() -> None:
    SEEN.clear()
    for tasks in ("vmap", "loop"):
        ht.unroll(APART, APART.init_hparams(), execution=ht.Execution(tasks=tasks))  # type: ignore[arg-type]
    assert {method for method, _, _ in SEEN} == {"init_params", "loss", "outer loss", "step_loss", "metrics"}
    outer, own = frozenset({"map", "l2"}), frozenset({"features", "targets", "shared"})
    assert {(hparams, found) for _, hparams, found in SEEN} == {(outer, own)}


def test_without_a_context_it_is_empty() -> None:
    class Plain(ht.InnerProblem):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": hparams["c"]}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, context: TensorDict) -> Tensor:
            note("plain", hparams, context)
            return (params["w"] - hparams["c"]).square()

    class Square(ht.OuterProblem):
        def init_hparams(self) -> TensorDict:
            return {"c": torch.tensor(2.0)}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return params["w"].square()

    SEEN.clear()
    problem = ht.BilevelProblem(Plain(), Square(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=1)
    ht.unroll(problem, problem.init_hparams())
    assert set(SEEN) == {("plain", frozenset({"c"}), frozenset())}


@pytest.mark.slow
def test_a_compiled_step_hands_it_over_too() -> None:
    hparams = APART.init_hparams()
    eager = ht.hypergradient(AMONG, hparams, backend=backends.Reverse())
    compiled = ht.hypergradient(_APART_QUIET, hparams, backend=backends.Reverse(compile=True))
    torch.testing.assert_close(compiled.grads, eager.grads, rtol=1e-10, atol=1e-10)


class FitQuietly(Fit):
    """The context apart, without notes, which a compiler cannot take."""

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, context: TensorDict) -> Tensor:
        assert not hparams.keys() & context.keys()
        return super().loss(params, {**hparams, **context}, batch)


_APART_QUIET = replace(AMONG, inner=FitQuietly())
