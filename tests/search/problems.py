"""A bilevel problem whose answer is a formula, and which diverges where its learning rate is large."""

from __future__ import annotations

import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.types import Batch, TensorDict

F64 = torch.float64
LR = 0.1
NUM_STEPS = 40
STARTS = {"l2": torch.tensor([0.5, 0.5], dtype=F64), "shift": torch.tensor(0.0, dtype=F64)}


class Inner(ht.InnerProblem):
    """Two shrunken numbers."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.zeros(2, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return 0.5 * ((params["w"] - 1.0).square() + hparams["l2"] * params["w"].square()).sum()


class Outer(ht.OuterProblem):
    """Wants the numbers at 0.8 and 0.4, and the shift at 1."""

    def __init__(self, **constraints: ht.Constraint) -> None:
        self._constraints = constraints

    def init_hparams(self) -> TensorDict:
        return {name: value.clone() for name, value in STARTS.items()}

    def constraints(self):
        return self._constraints

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        wanted = torch.tensor([0.8, 0.4], dtype=F64)
        return (params["w"] - wanted).square().sum() + (hparams["shift"] - 1.0).square()


def problem(**options: object) -> ht.BilevelProblem:
    settings: dict = {"dynamics": ht.dynamics.SGD(lr=LR), "num_steps": NUM_STEPS, **options}
    return ht.BilevelProblem(Inner(), settings.pop("outer", Outer()), **settings)


def outer_loss(l2: Tensor, shift: Tensor) -> Tensor:
    """By the geometric sum: `w_T = (1 - (1 - lr (1 + l2))^T) / (1 + l2)`."""
    w = (1 - (1 - LR * (1 + l2)) ** NUM_STEPS) / (1 + l2)
    return (w - torch.tensor([0.8, 0.4], dtype=F64)).square().sum() + (shift - 1.0).square()
