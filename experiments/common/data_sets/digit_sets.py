"""Many small data sets made of digits, which differ in size, noise and scale, and trainings on all of them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets.digits import CLASSES, Images
from hypertorch.types import Batch, TensorDict

NUM_CLASSES = 5
"""Digits in a data set."""

_CHUNK = 50  # data sets trained at once: what they hold stays in a processor's cache

# Ranges that a data set is drawn from: uniform, or uniform in the logarithm.
_LABEL_NOISE, _PIXEL_NOISE, _SCALE = (0.0, 0.5), (0.0, 1.0), (0.25, 4.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class DigitSet:
    """One small data set of some digits.

    Args:
        train: images with the digits that they are said to show, some of them wrongly.
        validation: images with the digits that they show.
        classes: the digits, ascending, shape `(NUM_CLASSES,)`.
    """

    train: Images
    validation: Images
    classes: Tensor

    def examples(self) -> Tensor:
        """Returns each training image beside its label, one-hot among all digits, shape `(images, pixels + 10)`."""
        labels = F.one_hot(self.train.labels, CLASSES).to(self.train.inputs)
        return torch.cat([self.train.inputs, labels], dim=1)


def draw_sets(
    images: Images, count: int, *, sizes: tuple[int, int], num_validation: int, generator: torch.Generator
) -> list[DigitSet]:
    """Returns data sets drawn from a pool of images; those of one data set are disjoint.

    Each has five of the digits, a number of training images, a share of random training labels, a standard deviation of
    noise on the pixels, and a factor that all pixels are multiplied by.

    Args:
        images: the pool.
        count: how many data sets.
        sizes: least and greatest number of training images.
        num_validation: validation images of each.
        generator: of the draws.

    Raises:
        ExpectedFailure: if five digits of the pool are too few images.
    """
    fewest = int(images.labels.bincount(minlength=CLASSES).sort().values[:NUM_CLASSES].sum())
    if sizes[1] + num_validation > fewest:
        raise ExpectedFailure(
            f"a data set has up to {sizes[1]} training and {num_validation} validation images "
            f"(`experiment.train_images`, `experiment.validation_images`), but five digits of its pool may have only "
            f"{fewest} images. Ask for fewer, or raise `experiment.pools`."
        )
    return [_draw_set(images, sizes, num_validation, generator) for _ in range(count)]


def _draw_set(images: Images, sizes: tuple[int, int], num_validation: int, generator: torch.Generator) -> DigitSet:
    def uniform(lower: float, upper: float) -> float:
        return lower + (upper - lower) * float(torch.rand((), generator=generator))

    def log_uniform(lower: float, upper: float) -> float:
        return math.exp(uniform(math.log(lower), math.log(upper)))

    classes = torch.randperm(CLASSES, generator=generator)[:NUM_CLASSES].sort().values
    places = torch.isin(images.labels.cpu(), classes).nonzero().flatten()
    size = round(log_uniform(*sizes))
    drawn = places[torch.randperm(len(places), generator=generator)[: size + num_validation]]
    pixel_noise, scale = uniform(*_PIXEL_NOISE), log_uniform(*_SCALE)
    noise = torch.randn(len(drawn), images.inputs.shape[1], generator=generator, dtype=torch.float64)
    inputs = scale * (images.inputs[drawn] + pixel_noise * noise.to(images.inputs))
    labels = images.labels[drawn]
    is_random = torch.rand(size, generator=generator) < uniform(*_LABEL_NOISE)
    guesses = classes[torch.randint(NUM_CLASSES, (size,), generator=generator)].to(labels)
    train = torch.where(is_random.to(labels.device), guesses, labels[:size])
    return DigitSet(
        train=Images(inputs=inputs[:size], labels=train),
        validation=Images(inputs=inputs[size:], labels=labels[size:]),
        classes=classes.to(labels),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Configurations:
    """What a training is given.

    Args:
        lr: learning rates, shape `(configurations,)`.
        l2: strengths of an L2 penalty, shape `(configurations,)`.
    """

    lr: Tensor
    l2: Tensor

    def __len__(self) -> int:
        return len(self.lr)


def validation_losses(sets: list[DigitSet], configurations: Configurations, *, num_steps: int) -> Tensor:
    """Returns the cross-entropy on the validation images after training with each configuration on each data set.

    Softmax regression from zero by gradient descent with momentum. Data sets are tasks, and the configurations of a
    data set lie side by side.

    Args:
        sets: data sets with equally many validation images.
        configurations: what each is trained with.
        num_steps: of full-batch gradient descent (unit: steps).

    Returns:
        Shape `(sets, configurations)`.
    """
    problem = ht.BilevelProblem(
        SideBySide(sets, configurations),
        SideBySideJudged(sets),
        dynamics=ht.dynamics.SGD(lr=1.0, momentum=0.9),
        num_steps=num_steps,
        num_tasks=len(sets),
    )
    result = ht.unroll(problem, problem.init_hparams(), execution=ht.Execution(tasks="vmap", chunk=_CHUNK))
    weights = result.params["weights"]
    images, labels = (torch.stack(part) for part in zip(*(_judged_on(one) for one in sets), strict=True))
    return torch.vmap(side_by_side)(weights, images, labels, images.new_ones(labels.shape))


def side_by_side(weights: Tensor, images: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """Returns the mean cross-entropy of softmax regression for each configuration, on one data set.

    Args:
        weights: shape `(configurations, classes, pixels + 1)`, the last entry the bias.
        images: shape `(images, pixels)`.
        labels: places of the digits among the classes, shape `(images,)`.
        shares: 1 for each image that counts, else 0, shape `(images,)`.

    Returns:
        Shape `(configurations,)`.
    """
    outputs = torch.einsum("np,kcp->nck", images, weights[..., :-1]) + weights[..., -1].T
    losses = F.cross_entropy(outputs, labels[:, None].expand(-1, len(weights)), reduction="none")
    return (losses * shares[:, None]).sum(dim=0) / shares.sum()


class SideBySide(ht.InnerProblem):
    """Softmax regression from zero, for all configurations of a data set side by side; each data set is a task.

    A gradient step of rate `lr` on a loss is one of rate 1 on `lr` times the loss, with momentum too.

    Args:
        sets: the data sets.
        configurations: what each is trained with.
    """

    def __init__(self, sets: list[DigitSet], configurations: Configurations) -> None:
        self._images, sizes = ht.search.pad_sets([one.train.inputs for one in sets])
        most = self._images.shape[1]
        places = [torch.searchsorted(one.classes, one.train.labels) for one in sets]
        self._labels = torch.stack([F.pad(own, (0, most - len(own))) for own in places])
        self._shares = (torch.arange(most, device=sizes.device) < sizes[:, None]).to(self._images)
        self._configurations = configurations

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns zeros, shape `(configurations, classes, pixels + 1)`."""
        shape = (len(self._configurations), NUM_CLASSES, self._images.shape[2] + 1)
        return {"weights": self._images.new_zeros(shape)}

    def batch(self, step: int) -> Batch:
        """Returns all training images, their labels, and which of them are there."""
        return self._images, self._labels, self._shares

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the sum over configurations of `lr (cross-entropy + l2 |W|^2 / 2)`: each has weights of its own."""
        weights, own = params["weights"], self._configurations
        penalties = own.l2 * weights[..., :-1].square().sum(dim=(1, 2)) / 2
        return (own.lr * (side_by_side(weights, *batch) + penalties)).sum()


class SideBySideJudged(ht.OuterProblem):
    """Judges each data set's weights on its validation images.

    Args:
        sets: the data sets.
    """

    def __init__(self, sets: list[DigitSet]) -> None:
        images, labels = zip(*(_judged_on(one) for one in sets), strict=True)
        self._batch = torch.stack(images), torch.stack(labels)

    def init_hparams(self) -> TensorDict:
        """Returns a number that takes no part: nothing is learnt here."""
        return {"none": self._batch[0].new_zeros(())}

    def batch(self, outer_step: int) -> Batch:
        """Returns the validation images and their labels."""
        return self._batch

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the mean over configurations."""
        images, labels = batch
        return side_by_side(params["weights"], images, labels, images.new_ones(len(labels))).mean()


def _judged_on(one: DigitSet) -> tuple[Tensor, Tensor]:
    return one.validation.inputs, torch.searchsorted(one.classes, one.validation.labels)
