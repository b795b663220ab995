"""Forward mode from where the last outer step ended, with its tangents and without."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import TensorDict
from tests.helpers.problems import net_problem, scalar_problem, scalars, task_problem
from tests.inner.test_tasks import net

Forward, Reverse = ht.hypergradients.Forward, ht.hypergradients.Reverse
SGD = ht.dynamics.SGD
LEARNT = scalars(lr=0.3, momentum=0.6, dampening=0.2, weight_decay=0.01)
LEARNT_SGD = SGD(**{name: ht.Hyper(name) for name in LEARNT})


def compute(problem: ht.BilevelProblem, backend: ht.Hypergradient | None = None) -> ht.HypergradientResult:
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend or Forward())


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_warm_start_without_tangents_differentiates_its_own_steps(chunk_size: int | None) -> None:
    problem = dataclasses.replace(net_problem(LEARNT_SGD, LEARNT, num_steps=3), warm_start=True)
    names = tuple(name for name in problem.init_hparams() if name.startswith("init."))
    problem = dataclasses.replace(problem, allow_unused=names)
    hparams = problem.init_hparams()
    carry = ht.hypergradient(problem, hparams, backend=Reverse()).carry
    expected = ht.hypergradient(problem, hparams, backend=Reverse(), carry=carry, outer_step=1)
    actual = ht.hypergradient(problem, hparams, backend=Forward(chunk_size=chunk_size), carry=carry, outer_step=1)
    assert actual.carry.keys() == expected.carry.keys()
    for name in hparams:
        torch.testing.assert_close(actual.grads[name], expected.grads[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 20])
def test_kept_tangents_reach_back_to_the_start(chunk_size: int | None) -> None:
    backend = Forward(chunk_size=chunk_size, keep_tangents=True)
    cold = net_problem(LEARNT_SGD, LEARNT, num_steps=2)
    warm = dataclasses.replace(cold, warm_start=True)
    hparams = warm.init_hparams()
    carry: TensorDict = {}
    for outer_step in range(3):
        result = ht.hypergradient(warm, hparams, backend=backend, carry=carry, outer_step=outer_step)
        carry = result.carry
        whole = dataclasses.replace(cold, num_steps=2 * (outer_step + 1))
        expected = ht.hypergradient(whole, hparams, backend=Reverse())
        for name in hparams:
            torch.testing.assert_close(result.grads[name], expected.grads[name], rtol=1e-11, atol=1e-13)
    assert int(carry["index"]) == 6
    assert carry["tangents.params.first"].shape == (59, 4, 6)
    assert carry["tangents.dynamics.momentum.second"].shape == (59, 6, 3)


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("task_chunk", [None, 2])
def test_kept_tangents_with_tasks_and_statistics(route: str, task_chunk: int | None) -> None:
    cold = task_problem(net("ours, running"), item=(1, 4, 4), num_steps=1)
    warm = dataclasses.replace(cold, warm_start=True)
    hparams = warm.init_hparams()
    carry: TensorDict = {}
    for outer_step in range(2):
        result = ht.hypergradient(
            warm,
            hparams,
            backend=Forward(keep_tangents=True, chunk_size=40),
            carry=carry,
            outer_step=outer_step,
            execution=ht.Execution(tasks=route, chunk=task_chunk),
        )
        carry = result.carry
    expected = ht.hypergradient(
        dataclasses.replace(cold, num_steps=2),
        hparams,
        backend=Reverse(),
        execution=ht.Execution(tasks=route, chunk=task_chunk),
    )
    for name in hparams:
        torch.testing.assert_close(result.grads[name], expected.grads[name], rtol=1e-10, atol=1e-13)
    entries = sum(value.numel() for value in hparams.values())
    assert carry["tangents.params.0.bias"].shape == (3, entries, 4)
    assert int(carry["shared.tangents"]) == entries


def test_keeping_tangents_is_refused_where_it_means_nothing() -> None:
    backend = Forward(keep_tangents=True)
    with pytest.raises(IncompatibleBackendError, match="`warm_start=False`: .*Set `warm_start=True`"):
        compute(scalar_problem(), backend)
    contextual = scalar_problem(warm_start=True, context=lambda h, b: {"more": h["c"]})
    with pytest.raises(IncompatibleBackendError, match="a `context`, which is computed anew.*keep_tangents=False"):
        compute(contextual, backend)
    warm = scalar_problem(warm_start=True)
    hparams = warm.init_hparams()
    without = ht.hypergradient(warm, hparams, backend=Forward()).carry
    with pytest.raises(ValueError, match=r"`carry` holds no tangents, .*carry of the same backend"):
        ht.hypergradient(warm, hparams, backend=backend, carry=without)
    one = ht.hypergradient(warm, hparams, backend=backend).carry
    more = scalar_problem(warm_start=True, hparams=scalars(c=2.0, d=1.0), allow_unused=("d",))
    with pytest.raises(ValueError, match=r"the tangents of 1 entries, but .* in 2 entries"):
        ht.hypergradient(more, more.init_hparams(), backend=backend, carry=one)
