"""Problems of the experiments with as many hyperparameters as one asks for, each shared by few or by many."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.data_sets.digits import CLASSES, digit_splits
from experiments.common.models.labelled_images import CleanImages, first_params
from experiments.common.models.mlp import MLP
from experiments.common.runs.seeds import run_seed
from experiments.common.search.search_tasks import SearchTask
from experiments.noisy_digits import LabelledScans, load_scans
from experiments.pixel_penalty import PenalisedTraining
from experiments.schedules import ScaledTraining
from hypertorch.types import Batch, TensorDict

STEPS = 50
_PIXELS, _SIDE = 64, 8
_BATCH = 100
_SCANS = 1000
_NET = MLP((_PIXELS, 30, CLASSES))
# What a side of the cube stands for.
_LOG_L2 = (math.log(1e-6), 0.0)
_LOG_LR = (math.log(1e-2), math.log(10.0))
_LOGIT_MOMENTUM = (-4.0, 4.0)
_TRUST = (-6.0, 6.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class SizedTask:
    """Training that is searched by a point of the unit cube, and its judgement on images that the search never sees.

    Args:
        problem: the training, judged on the validation images; its outer variable `point` has shape `(dimension,)`.
        tests: the same, judged on the test images; where training is random, with other seeds.
    """

    problem: ht.BilevelProblem
    tests: Sequence[ht.BilevelProblem]

    def search_task(self) -> SearchTask:
        """Returns what a search sees: the validation loss, and its hypergradient where it is wanted."""
        start = self.problem.init_hparams()["point"]
        backend = ht.hypergradients.Reverse()

        def evaluate(point: Tensor, with_gradient: bool) -> tuple[float, Tensor | None]:
            hparams = {"point": point.to(start)}
            if not with_gradient:
                return float(ht.unroll(self.problem, hparams).outer_loss), None
            try:
                found = ht.hypergradient(self.problem, hparams, backend=backend)
            except ht.errors.NonFiniteError:
                return math.nan, torch.full_like(point, math.nan)
            return float(found.outer_loss), found.grads["point"].to(point)

        return SearchTask(dimension=len(start), evaluate=evaluate, least=None, start=start.double())

    def test_loss(self, point: Tensor) -> float:
        """Returns the loss on the test images, the mean over the seeds of training."""
        hparams = {"point": point.to(self.problem.init_hparams()["point"])}
        return sum(float(ht.unroll(problem, hparams).outer_loss) for problem in self.tests) / len(self.tests)


def penalties(size: int, seed: int, dtype: torch.dtype = torch.float32) -> SizedTask:
    """Returns the L2 penalties of `pixel_penalty`: of softmax regression on 200 scans of digits, from 1e-6 to 1.

    Args:
        size: 1 for all weights, 8 for the rows of the image, 64 for its pixels, 640 for all weights.
        seed: of the scans and of the minibatches.
        dtype: of the training.
    """
    pixel = torch.arange(_PIXELS)
    groups = {
        1: torch.zeros(CLASSES, _PIXELS, dtype=torch.long),
        _SIDE: (pixel // _SIDE).expand(CLASSES, -1),
        _PIXELS: pixel.expand(CLASSES, -1),
        CLASSES * _PIXELS: torch.arange(CLASSES * _PIXELS).reshape(CLASSES, -1),
    }[size]
    images = digit_splits("digits", {"train": 200, "validation": 800, "test": 0}, seed=seed, dtype=dtype)
    train = TensorDataset(*images["train"].pairs())
    first = {name: value.to(dtype) for name, value in first_params(_PIXELS, 0, torch.Generator()).items()}

    def context(hparams: TensorDict, _: Batch) -> TensorDict:
        return {"log_l2": _between(_LOG_L2, hparams["point"])[groups]}

    def problem(split: str, own: int) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            PenalisedTraining(ht.Minibatches(train, _BATCH, seed=own), first),
            CleanImages(data=images[split].pairs(), first=_middle(size, dtype)),
            dynamics=ht.dynamics.SGD(lr=0.3, momentum=0.9),
            num_steps=STEPS,
            context=context,
            seed=own,
        )

    return _with_tests(problem, seed)


def schedules(size: int, seed: int, dtype: torch.dtype = torch.float32) -> SizedTask:
    """Returns the learning rates of `schedules`: of a net with 30 hidden units on 1,000 scans, from 0.01 to 10.

    The momentum is a half, but with 400 numbers, where it is searched from 0.02 to 0.98. The run that is searched by
    has its first weights and minibatches; the test has others.

    Args:
        size: the number of equal pieces of the 50 steps (a divisor of 50), each with its own rate; or 400 for a rate
            and a momentum for each step and tensor of the net.
        seed: of the scans, of the minibatches and of the first weights.
        dtype: of the training.
    """
    images = digit_splits("digits", {"train": 1000, "validation": 400, "test": 0}, seed=seed, dtype=dtype)
    train = TensorDataset(*images["train"].pairs())
    names = list(_NET.shapes())

    def context(hparams: TensorDict, _: Batch) -> TensorDict:
        point = hparams["point"]
        if size == 2 * STEPS * len(names):
            rates, momenta = point.reshape(2, len(names), STEPS)
        else:
            rates = point.repeat_interleave(STEPS // size).expand(len(names), -1)
            momenta = torch.full_like(rates, 0.5)
        found: TensorDict = {}
        for name, rate, momentum in zip(names, rates, momenta, strict=True):
            found[f"log_lr.{name}"] = _between(_LOG_LR, rate)
            found[f"logit_momentum.{name}"] = _between(_LOGIT_MOMENTUM, momentum)
            found[f"log_scale.{name}"] = point.new_tensor(-2.0)
            found[f"log_l2.{name}"] = point.new_tensor(-10.0)
        return found

    def problem(split: str, own: int) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            ScaledTraining(net=_NET, batches=ht.Minibatches(train, _BATCH, seed=own)),
            CleanImages(data=images[split].pairs(), first=_middle(size, dtype), net=_NET),
            dynamics=ht.dynamics.SGD(
                lr=ht.Hyper("log_lr", torch.exp, per="step,parameter"),
                momentum=ht.Hyper("logit_momentum", torch.sigmoid, per="step,parameter"),
            ),
            num_steps=STEPS,
            context=context,
            seed=own,
        )

    return _with_tests(problem, seed)


def weights(size: int, seed: int, dtype: torch.dtype = torch.float32) -> SizedTask:
    """Returns the weights of `noisy_digits`: of 1,000 scans, some with random labels.

    The share of random labels grows from none of the first scans to nine tenths of the last.

    Args:
        size: the number of equal groups of the 1,000 scans (a divisor of 1,000), each with its own weight.
        seed: of the scans and of their labels.
        dtype: of the training.
    """
    scans = load_scans(
        num_labellers=_SCANS,
        scans_each=1,
        num_validation=400,
        most_wrong=0.9,
        seed=seed,
        device="cpu",
        dtype=dtype,
    )
    first = {name: value.to(dtype) for name, value in first_params(_PIXELS, 0, torch.Generator()).items()}

    def context(hparams: TensorDict, _: Batch) -> TensorDict:
        trust = _between(_TRUST, hparams["point"]).repeat_interleave(_SCANS // size)
        return {"trust": trust, "log_l2": trust.new_tensor(-6.0)}

    def problem(split: str, own: int) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            LabelledScans(data=scans.training, first=first),
            CleanImages(data=scans.judged[split], first=_middle(size, dtype)),
            dynamics=ht.dynamics.SGD(lr=1.0, momentum=0.9),
            num_steps=STEPS,
            context=context,
            seed=own,
        )

    # Nothing is random in this training.
    return _with_tests(problem, seed, count=1)


def _between(limits: tuple[float, float], places: Tensor) -> Tensor:
    low, high = limits
    return low + (high - low) * places


def _middle(size: int, dtype: torch.dtype) -> TensorDict:
    return {"point": torch.full((size,), 0.5, dtype=dtype)}


def _with_tests(problem: Callable[[str, int], ht.BilevelProblem], seed: int, count: int = 5) -> SizedTask:
    return SizedTask(
        problem=problem("validation", run_seed(seed, "training", 0)),
        tests=[problem("test", run_seed(seed, "evaluation", index)) for index in range(count)],
    )


SIZED: Mapping[str, tuple[tuple[int, ...], Callable[[int, int], SizedTask]]] = {
    "penalties": ((1, _SIDE, _PIXELS, CLASSES * _PIXELS), penalties),
    "schedules": ((1, 2, 5, 10, 25, STEPS, 2 * STEPS * len(_NET.shapes())), schedules),
    "weights": (tuple(size for size in range(1, _SCANS + 1) if _SCANS % size == 0), weights),
}
"""By name: the numbers of hyperparameters that there can be, and what makes the task from one of them and a seed."""
