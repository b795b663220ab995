"""bfloat16 inside, float32 outside: dtypes, closeness, memory, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hypertorch as ht
from hypertorch.fewshot import MAML, MLP, Regression, Sinusoid
from hypertorch.hypergradients import Forward, Reverse
from hypertorch.live_memory import PeakMemory
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem
from tests.helpers.sized_problems import conv_net, mlp, sized_problem

BF16 = torch.bfloat16


class ProductDtypes(TorchDispatchMode):
    """Counts the dtypes of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default):
            self.calls[result.dtype] += 1
        return result


def in_both(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> tuple[ht.HypergradientResult, ...]:
    hparams = problem.init_hparams()
    coarse = replace(problem, inner_dtype=BF16)
    return tuple(ht.hypergradient(one, hparams, backend=backend) for one in (problem, coarse))


@pytest.mark.parametrize(
    "backend",
    [Reverse(), Reverse(checkpoint_every=1), Reverse(derivative="mixed"), Forward()],
    ids=lambda backend: repr(backend)[:40],
)
def test_close_to_float32_and_summed_up_in_it(backend: ht.Hypergradient) -> None:
    few = isinstance(backend, Forward)
    problem = sized_problem(mlp(10, 8, 5), 3 if few else 40, 10, num_steps=20, learnt_init=not few)
    fine, coarse = in_both(problem, backend)
    for name, value in fine.grads.items():
        assert coarse.grads[name].dtype == torch.float32
        assert not torch.equal(coarse.grads[name], value)
        likeness = F.cosine_similarity(coarse.grads[name].flatten(), value.flatten(), dim=0)
        assert likeness > 0.99, (name, float(likeness))
    assert {value.dtype for value in coarse.params.values()} == {torch.float32}


def test_products_of_the_inner_loss_alone_are_coarse() -> None:
    problem = replace(sized_problem(mlp(10, 8, 5), 20, 10, num_steps=3), inner_dtype=BF16)
    with ProductDtypes() as products:
        ht.unroll(problem, problem.init_hparams())
    assert products.calls[BF16] >= 3 * 2  # two layers, three steps
    with ProductDtypes() as outer_only:
        ht.unroll(replace(problem, num_steps=0), problem.init_hparams())
    assert set(outer_only.calls) <= {torch.float32}


def test_a_graph_holds_little_more_than_half() -> None:
    problem = sized_problem(conv_net(), 200, 1, 12, 12, num_steps=4)
    hparams = problem.init_hparams()
    peaks = []
    for one in (problem, replace(problem, inner_dtype=BF16)):
        ht.hypergradient(one, hparams, backend=Reverse())
        with PeakMemory() as memory:
            ht.hypergradient(one, hparams, backend=Reverse())
        peaks.append(memory.peak)
    assert peaks[1] < 0.75 * peaks[0], peaks


def test_params_of_float64_are_refused() -> None:
    problem = replace(net_problem(ht.dynamics.SGD(lr=0.1), {}), inner_dtype=BF16)
    with pytest.raises(ValueError, match="the inner params have the dtype torch.float64"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16"])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="`inner_dtype` is "):
        ht.BilevelProblem(
            LambdaInner(lambda h: {"w": h["w"]}, lambda p, h, b: p["w"].sum()),
            LambdaOuter({"w": torch.ones(2)}, lambda p, h, b: p["w"].sum()),
            dynamics=ht.dynamics.SGD(lr=0.1),
            num_steps=1,
            inner_dtype=dtype,
        )


def test_learners_pass_it_on() -> None:
    learner = MAML(MLP(), dynamics=ht.dynamics.SGD(lr=0.01), num_steps=2, objective=Regression())
    source = learner.on(Sinusoid(num_tasks=3, seed=0), inner_dtype=BF16)
    problem = source.at(0)
    assert isinstance(problem, ht.BilevelProblem) and problem.inner_dtype is BF16
    coarse = ht.hypergradient(problem, source.init_hparams(), backend=Reverse())
    fine = ht.hypergradient(replace(problem, inner_dtype=None), source.init_hparams(), backend=Reverse())
    for name, value in fine.grads.items():
        torch.testing.assert_close(coarse.grads[name], value, rtol=0.1, atol=0.05 * float(value.abs().max()))
