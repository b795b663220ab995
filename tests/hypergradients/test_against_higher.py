"""Unrolled SGD agrees with `higher`, an independent implementation, where that is known to be right."""

from __future__ import annotations

import higher
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, normal


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.3},
        {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.02},
        {"lr": 0.2, "momentum": 0.8, "nesterov": True},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("every", [None, 2])
def test_maml_gradient_equals_that_of_higher(settings: dict, every: int | None) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    support, query = normal(8, 4, seed=1), normal(8, 4, seed=2)
    labels = torch.arange(8) % 3

    with higher.innerloop_ctx(module, torch.optim.SGD(module.parameters(), **settings), copy_initial_weights=False) as (
        twin,
        optimizer,
    ):
        for _ in range(5):
            optimizer.step(F.cross_entropy(twin(support), labels))
        outer = F.cross_entropy(twin(query), labels)
        expected = dict(zip(
            dict(module.named_parameters()), torch.autograd.grad(outer, list(module.parameters())), strict=True
        ))  # fmt: skip

    net = ht.FunctionalModule(module)

    def loss(params: TensorDict, inputs: Tensor) -> Tensor:
        return F.cross_entropy(net(params, inputs), labels)

    problem = ht.BilevelProblem(
        LambdaInner(lambda h: dict(h), lambda p, h, b: loss(p, support)),
        LambdaOuter(net.init_params(), lambda p, h, b: loss(p, query)),
        dynamics=ht.dynamics.SGD(**settings),
        num_steps=5,
    )
    backend = ht.hypergradients.Reverse(checkpoint_every=every)
    result = ht.hypergradient(problem, problem.init_hparams(), backend=backend)
    torch.testing.assert_close(result.outer_loss, outer.detach(), rtol=1e-12, atol=1e-14)
    for name, value in expected.items():
        torch.testing.assert_close(result.grads[name], value, rtol=1e-10, atol=1e-13)
