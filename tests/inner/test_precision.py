"""bfloat16 inside, float32 outside: dtypes, closeness, memory, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hypertorch as ht
from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.fewshot import MAML, MLP, Regression, Sinusoid
from hypertorch.hypergradients import Forward, Reverse
from tests.helpers.problems import net_problem
from tests.helpers.sized_problems import conv_net, mlp, sized_problem

BF16 = torch.bfloat16
COARSE = ht.Execution(inner_dtype=BF16)


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
    return tuple(
        ht.hypergradient(problem, hparams, backend=backend, execution=execution)
        for execution in (ht.Execution(), COARSE)
    )


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
    problem = sized_problem(mlp(10, 8, 5), 20, 10, num_steps=3)
    ht.unroll(problem, problem.init_hparams(), execution=COARSE)  # which looks at the kind of problem
    with ProductDtypes() as products:
        ht.unroll(problem, problem.init_hparams(), execution=COARSE)
    assert products.calls[BF16] >= 3 * 2  # two layers, three steps
    assert products.calls[torch.float32] == 2  # those of the outer loss


def test_a_graph_holds_little_more_than_half() -> None:
    problem = sized_problem(conv_net(), 200, 1, 12, 12, num_steps=4)
    hparams = problem.init_hparams()
    peaks = []
    for execution in (ht.Execution(), COARSE):
        ht.hypergradient(problem, hparams, backend=Reverse(), execution=execution)
        with PeakMemory() as memory:
            ht.hypergradient(problem, hparams, backend=Reverse(), execution=execution)
        peaks.append(memory.peak)
    assert peaks[1] < 0.75 * peaks[0], peaks


def test_params_of_float64_are_refused() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.1), {})
    with pytest.raises(ValueError, match="the inner params have the dtype torch.float64"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(), execution=COARSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16"])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="`inner_dtype` is "):
        ht.Execution(inner_dtype=dtype)


def test_learners_are_served() -> None:
    learner = MAML(MLP(), dynamics=ht.dynamics.SGD(lr=0.01), num_steps=2, objective=Regression())
    source = learner.on(Sinusoid(num_tasks=3, seed=0))
    coarse = ht.hypergradient(source.at(0), source.init_hparams(), backend=Reverse(), execution=COARSE)
    fine = ht.hypergradient(source.at(0), source.init_hparams(), backend=Reverse())
    assert any(not torch.equal(coarse.grads[name], value) for name, value in fine.grads.items())
    for name, value in fine.grads.items():
        torch.testing.assert_close(coarse.grads[name], value, rtol=0.1, atol=0.05 * float(value.abs().max()))
