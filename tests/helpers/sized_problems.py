"""Problems of a size at which memory can be told apart: activations, weights and examples in chosen proportions."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.types import Batch, TensorDict


class WeightedFit(ht.InnerProblem):
    """A module fitted to random data with learnt example weights, from a fixed or a learnt initialisation."""

    def __init__(self, module: nn.Module, inputs: Tensor, *, learnt_init: bool = False, copies: bool = False) -> None:
        self.net = ht.FunctionalModule(module)
        self.inputs, self.labels = inputs, torch.arange(len(inputs)) % 5
        self.learnt_init, self.copies = learnt_init, copies

    def init_params(self, hparams: TensorDict) -> TensorDict:
        params = self.net.init_params()
        return {name: hparams[f"init.{name}"] if self.learnt_init else value.clone() for name, value in params.items()}

    def batch(self, step: int) -> Batch:
        # A copy is what a loader hands over: memory of its own at every step.
        return self.inputs.clone() if self.copies else self.inputs

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        losses = F.cross_entropy(self.net(params, batch), self.labels, reduction="none")
        return (hparams["weights"].sigmoid() * losses).mean()


class Fit(ht.OuterProblem):
    """The loss on the same data, without weights."""

    def __init__(self, inner: WeightedFit, extra: TensorDict | None = None) -> None:
        self.inner, self.extra = inner, extra or {}

    def init_hparams(self) -> TensorDict:
        inner = self.inner
        init = {f"init.{name}": value for name, value in inner.net.init_params().items()} if inner.learnt_init else {}
        return {"weights": torch.zeros(len(inner.inputs)), **init, **self.extra}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return F.cross_entropy(self.inner.net(params, self.inner.inputs), self.inner.labels)


class FitWithSteps(Fit):
    """The same with a term at every inner step."""

    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return 0.1 * self.loss(params, hparams, batch)


def sized_problem(
    module: nn.Module,
    *shape: int,
    num_steps: int,
    dynamics: ht.Dynamics | None = None,
    extra: TensorDict | None = None,
    learnt_init: bool = False,
    copies: bool = False,
    step_terms: bool = False,
) -> ht.BilevelProblem:
    """Returns a module fitted to random inputs of this shape, in the default dtype."""
    inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    inner = WeightedFit(module, inputs, learnt_init=learnt_init, copies=copies)
    outer = (FitWithSteps if step_terms else Fit)(inner, extra)
    return ht.BilevelProblem(inner, outer, dynamics=dynamics or ht.dynamics.SGD(lr=0.1), num_steps=num_steps)


def mlp(*widths: int) -> nn.Module:
    """Returns linear layers with tanh between them, seeded."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def conv_net() -> nn.Module:
    """Returns a small convolutional net for images of 1 x 12 x 12, seeded."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 5),
    )
