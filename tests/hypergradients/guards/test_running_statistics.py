"""Running statistics that PyTorch updates without a derivative: refused where they are read, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot import BatchNorm
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaOuter, normal, scalars

backends = ht.hypergradients
BACKENDS = [
    backends.Reverse(),
    backends.Reverse(checkpoint_every=1),
    backends.Forward(),
    backends.Truncated(window=4),
    backends.OneStep(),
]


class Images(nn.Module):
    """A norm over images, seen from rows of numbers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), norm, nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(inputs)[:, :, None, None])[:, :, 0, 0]))


class Fit(ht.InnerProblem):
    def __init__(self, module: nn.Module) -> None:
        self.net = ht.FunctionalModule(module)
        self.buffers = self.net.buffers
        self.inputs, self.labels = normal(10, 3, seed=1), torch.arange(10) % 2

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return self.net.init_params()

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
        outputs, buffers = self.net.with_buffers(params, self.inputs)
        losses = F.cross_entropy(outputs, self.labels, reduction="none")
        return losses @ hparams["weights"].sigmoid() / 10, buffers


class Judge(ht.OuterProblem):
    """Judges in training mode (by the batch's statistics) or in evaluation mode (by the stored ones)."""

    def __init__(self, module: nn.Module, mode: bool) -> None:
        self.net, self.mode = ht.FunctionalModule(module), mode
        self.inputs = 0.9 * normal(10, 3, seed=1)

    def init_hparams(self) -> TensorDict:
        return {"weights": torch.zeros(10, dtype=torch.float64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        self.net.module.train(self.mode)
        outputs = self.net(params, self.inputs)
        self.net.module.train()
        return F.cross_entropy(outputs, 1 - torch.arange(10) % 2)


def problem(norm: nn.Module, training_mode: bool) -> ht.BilevelProblem:
    torch.manual_seed(0)
    module = Images(norm).double()
    rule = ht.dynamics.SGD(lr=0.5, momentum=0.8)
    return ht.BilevelProblem(Fit(module), Judge(module, training_mode), dynamics=rule, num_steps=4)


@pytest.mark.parametrize("backend", BACKENDS, ids=repr)
def test_statistics_without_a_derivative_are_refused_where_they_are_read(backend: ht.Hypergradient) -> None:
    made = problem(nn.BatchNorm2d(4), training_mode=False)
    for _ in range(2):  # the answer is remembered, and given again
        with pytest.raises(
            IncompatibleBackendError, match=r"`norm.running_mean` is updated .*Call `.eval\(\)` on the layer"
        ):
            ht.hypergradient(made, made.init_hparams(), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS, ids=repr)
def test_statistics_that_nothing_reads_are_carried_along(backend: ht.Hypergradient) -> None:
    made = problem(nn.BatchNorm2d(4), training_mode=True)
    result = ht.hypergradient(made, made.init_hparams(), backend=backend)
    assert result.params["norm.num_batches_tracked"] == 4


def test_in_training_mode_the_hypergradient_is_exact() -> None:
    made = problem(nn.BatchNorm2d(4), training_mode=True)
    check = ht.check_hypergradient(made, made.init_hparams(), backends.Reverse())
    assert check.passed, str(check)


@pytest.mark.parametrize("backend", [backends.Reverse(), backends.Forward()], ids=repr)
def test_statistics_with_a_derivative_are_exact_where_they_are_read(backend: ht.Hypergradient) -> None:
    made = problem(BatchNorm(4, statistics="running", momentum=0.3), training_mode=False)
    check = ht.check_hypergradient(made, made.init_hparams(), backend)
    assert check.passed, str(check)


def test_values_alone_miss_nothing() -> None:
    made = problem(nn.BatchNorm2d(4), training_mode=False)
    evolution = backends.EvolutionStrategies(num_pairs=2, sigma=0.1)
    assert ht.hypergradient(made, made.init_hparams(), backend=evolution).grads["weights"].any()


class Far(ht.InnerProblem):
    """One param, far from 0, whose value is kept in a buffer without a derivative."""

    buffers = ("seen",)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        far = torch.tensor(1e20, dtype=torch.float64)
        return {"w": far, "seen": far}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
        return hparams["c"] * (params["w"] / 1e20).square(), {"seen": params["w"].detach()}


def test_dependence_is_seen_whatever_the_size_of_numbers() -> None:
    outer = LambdaOuter(scalars(c=1.0), lambda p, h, b: (p["seen"] + p["w"]) / 1e20)
    made = ht.BilevelProblem(Far(), outer, dynamics=ht.dynamics.SGD(lr=1e38), num_steps=3)
    with pytest.raises(IncompatibleBackendError, match=r"`seen` is updated by the inner loss without a derivative"):
        ht.hypergradient(made, made.init_hparams(), backend=backends.Reverse())
