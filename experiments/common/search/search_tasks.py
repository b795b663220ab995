"""What searches are compared on: functions of the unit cube whose gradient is known, and training on digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.data_sets.digits import CLASSES, Images, digit_splits
from experiments.common.search.black_boxes import branin
from hypertorch.types import Batch, TensorDict

Evaluate: TypeAlias = Callable[[Tensor, bool], tuple[float, Tensor | None]]
"""`(point of the cube, whether the gradient is wanted) -> (value, gradient)`; NaN where it diverged."""

_F64 = torch.float64
_SIDE = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchTask:
    """A function of the unit cube, to be minimised.

    Args:
        dimension: of the cube.
        evaluate: its value, and its gradient where it is wanted.
        least: its minimum; None where it is not known.
        start: where every search begins, shape `(dimension,)`; None for the first point of the Sobol sequence.
    """

    dimension: int
    evaluate: Evaluate
    least: float | None
    start: Tensor | None = None


def branin_task(seed: int) -> SearchTask:
    """Returns Branin's function: three equal minima."""
    del seed
    return _of_function(2, branin, 0.39788735772973816)


def hartmann6_task(seed: int) -> SearchTask:
    """Returns Hartmann's function of six numbers: six minima, of which the second best is worse by 0.12."""
    del seed
    heights = torch.tensor([1.0, 1.2, 3.0, 3.2], dtype=_F64)
    rows = (
        (10.0, 3, 17, 3.5, 1.7, 8),
        (0.05, 10, 17, 0.1, 8, 14),
        (3, 3.5, 1.7, 10, 17, 8),
        (17, 8, 0.05, 10, 0.1, 14),
    )
    widths = torch.tensor(rows, dtype=_F64)
    places = (
        (1312, 1696, 5569, 124, 8283, 5886),
        (2329, 4135, 8307, 3736, 1004, 9991),
        (2348, 1451, 3522, 2883, 3047, 6650),
        (4047, 8828, 8732, 5743, 1091, 381),
    )
    centres = 1e-4 * torch.tensor(places, dtype=_F64)

    def function(point: Tensor) -> Tensor:
        return -(heights @ (-(widths * (point - centres).square()).sum(dim=1)).exp())

    return _of_function(6, function, -3.3223680114155147)


def shifted_ackley5_task(seed: int) -> SearchTask:
    """Returns Ackley's function of five numbers, with its minimum at a random place in the middle half of the cube.

    Its gradient is mostly that of its ripples, and says little of where the minimum is.
    """
    generator = torch.Generator().manual_seed(seed)
    centre = 0.25 + 0.5 * torch.rand(5, generator=generator, dtype=_F64)

    def function(point: Tensor) -> Tensor:
        x = 65.536 * (point - centre)
        # The root has no derivative at the minimum.
        distance = (x.square().mean() + 1e-30).sqrt()
        return -20 * (-0.2 * distance).exp() - (2 * math.pi * x).cos().mean().exp() + 20 + math.e

    return _of_function(5, function, 0.0)


def _of_function(dimension: int, function: Callable[[Tensor], Tensor], least: float) -> SearchTask:
    def evaluate(point: Tensor, with_gradient: bool) -> tuple[float, Tensor | None]:
        leaf = point.clone().requires_grad_()
        value = function(leaf)
        gradient = torch.autograd.grad(value, leaf)[0] if with_gradient else None
        return float(value.detach()), gradient

    return SearchTask(dimension=dimension, evaluate=evaluate, least=least)


class _Training(ht.InnerProblem):
    """Softmax regression with one L2 penalty for each of nine parts of the image."""

    def __init__(self, images: Images) -> None:
        self._inputs, self._labels = images.pairs()
        thirds = torch.arange(_SIDE) * 3 // _SIDE
        self._part = (3 * thirds.unsqueeze(1) + thirds).flatten()

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"weight": torch.zeros(_SIDE**2, CLASSES, dtype=_F64), "bias": torch.zeros(CLASSES, dtype=_F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        fit = F.cross_entropy(self._inputs @ params["weight"] + params["bias"], self._labels)
        return fit + 0.5 * (hparams["l2"][self._part] * params["weight"].square().sum(dim=1)).sum()


class _Validation(ht.OuterProblem):
    """The cross-entropy of images with true labels."""

    def __init__(self, images: Images) -> None:
        self._inputs, self._labels = images.pairs()

    def init_hparams(self) -> TensorDict:
        return {"l2": torch.full((9,), 1e-2, dtype=_F64), "lr": torch.tensor(0.1, dtype=_F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return F.cross_entropy(self._inputs @ params["weight"] + params["bias"], self._labels)


DIGITS_BOUNDS = {"l2": (1e-4, 1.0), "lr": (1e-2, 1.0)}


def digits_problem(seed: int, *, wrong: float = 0.3, num_steps: int = 100) -> ht.BilevelProblem:
    """Returns training on 150 scans of digits, some with a random label, judged on 500 others.

    Args:
        seed: of the scans and of the labels.
        wrong: share of the labels that are drawn at random.
        num_steps: the horizon (unit: steps).
    """
    splits = digit_splits("digits", {"train": 150, "validation": 500}, seed=seed, dtype=_F64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(CLASSES, (150,), generator=generator)
    mislabelled = torch.rand(150, generator=generator) < wrong
    train = Images(inputs=splits["train"].inputs, labels=torch.where(mislabelled, drawn, splits["train"].labels))
    return ht.BilevelProblem(
        _Training(train),
        _Validation(splits["validation"]),
        dynamics=ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=0.9),
        num_steps=num_steps,
    )


def digits_task(seed: int) -> SearchTask:
    """Returns the validation loss of `digits_problem` by the logarithms of nine L2 penalties and a rate."""
    problem = digits_problem(seed)
    ends = torch.tensor([DIGITS_BOUNDS["l2"]] * 9 + [DIGITS_BOUNDS["lr"]], dtype=_F64).log()
    low, span = ends[:, 0], ends[:, 1] - ends[:, 0]
    backend = ht.hypergradients.Reverse()

    def evaluate(point: Tensor, with_gradient: bool) -> tuple[float, Tensor | None]:
        own = (low + span * point).exp()
        hparams = {"l2": own[:9], "lr": own[9]}
        if not with_gradient:
            return float(ht.unroll(problem, hparams).outer_loss), None
        try:
            found = ht.hypergradient(problem, hparams, backend=backend)
        except ht.errors.NonFiniteError:
            return math.nan, torch.full_like(point, math.nan)
        grads = torch.cat([found.grads["l2"], found.grads["lr"].reshape(1)])
        return float(found.outer_loss), grads * own * span

    return SearchTask(dimension=10, evaluate=evaluate, least=None)


TASKS: dict[str, Callable[[int], SearchTask]] = {
    "branin": branin_task,
    "hartmann6": hartmann6_task,
    "ackley5": shifted_ackley5_task,
    "digits": digits_task,
}
