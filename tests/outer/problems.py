"""A small source of problems whose hypergradient is written down by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.types import Batch, TensorDict


def centres(step: int, *shape: int) -> Tensor:
    """The data of an outer step."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Inner(ht.InnerProblem):
    """Descends `curvature * |w - 1|^2 / 2` from `start`."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["start"] * 1.0}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return hparams["curvature"] * (params["w"] - 1.0).square().sum() / 2


@dataclass(frozen=True, kw_only=True)
class Outer(ht.OuterProblem):
    """Judges by `|w - centre|^2 / 2`."""

    step: int
    num_tasks: int | None
    metric: str

    def init_hparams(self) -> TensorDict:
        return Quadratics().init_hparams()

    def batch(self, outer_step: int) -> Batch:
        return centres(self.step, *(() if self.num_tasks is None else (self.num_tasks,)), 3)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - batch).square().sum() / 2

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        return {self.metric: (params["w"] - batch).abs().max()}


@dataclass(frozen=True, kw_only=True)
class Quadratics(ht.ProblemSource):
    """Two outer variables, `start` of shape (3,) and the scalar `curvature`; another centre at every outer step.

    With `r = 1 - lr * curvature`: `w_T = 1 + r^T (start - 1)`.
    """

    num_tasks: int | None = 4
    num_steps: int = 3
    lr: float = 0.1
    metric: str = "distance"
    offset: int = 0
    fail_at: int | None = None
    failure: BaseException | None = None

    def init_hparams(self) -> TensorDict:
        return {
            "start": torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64),
            "curvature": torch.tensor(2.0, dtype=torch.float64),
        }

    def at(self, outer_step: int) -> ht.BilevelProblem:
        if outer_step == self.fail_at:
            raise self.failure or RuntimeError("the power went out")
        return ht.BilevelProblem(
            Inner(),
            Outer(step=outer_step + self.offset, num_tasks=self.num_tasks, metric=self.metric),
            dynamics=ht.dynamics.SGD(lr=self.lr),
            num_steps=self.num_steps,
            num_tasks=self.num_tasks,
        )

    def formula(self, hparams: TensorDict, outer_step: int) -> tuple[Tensor, TensorDict]:
        """Returns the outer loss and its hypergradient."""
        start, curvature = hparams["start"], hparams["curvature"]
        rate = 1 - self.lr * curvature
        centre = centres(outer_step + self.offset, self.num_tasks or 1, 3)
        residual = (1 + rate**self.num_steps * (start - 1)) - centre
        in_rate = self.num_steps * rate ** (self.num_steps - 1) * (start - 1)
        return residual.square().sum(1).mean() / 2, {
            "start": residual.mean(0) * rate**self.num_steps,
            "curvature": (residual * in_rate).sum(1).mean() * -self.lr,
        }
