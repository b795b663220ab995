"""Ten images to learn from, one for each digit, found by gradient descent on their pixels, through training.

scripts/train experiment=distilled_data
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.readers import positive_number
from experiments.common.data_sets.digits import CLASSES
from experiments.common.models.labelled_images import CleanImages
from experiments.common.models.mlp import MLP
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline
from experiments.common.runs.seeds import Purpose, run_seed
from hypertorch.types import Batch, TensorDict

# The rates that a baseline chooses from.
_RATES = tuple(10 ** (exponent / 4) for exponent in range(-14, 5))


@dataclass(eq=False, repr=False, kw_only=True)
class DistilledData(DigitsExperiment):
    """Learns one training image for each digit, and the learning rate, so that a net trained on these ten does well.

    An inner run trains a net on the ten images, all of them at each step. The outer loss is that of the trained net on
    real images. The first weights are the same in every run ("same"), or drawn anew for every outer step ("new").

    Args:
        config: the configuration; `dynamics.lr` is the learning rate before the first outer step.
        sizes: real images for "train" (the outer loss), "validation" and "test"; 0 for all that are left over.
        hidden: width of the net's hidden layer; 0 for none, which is softmax regression.
        first_weights: "same" or "new".
        rates: "one" learnt rate, or one for each inner "step".
        outer_batch_size: real images in an outer step.
        num_steps: the horizon (unit: inner steps).
        first_scale: standard deviation of the learnt pixels before the first outer step.
        weight_scale: standard deviation of the net's first weights, in units of `1/sqrt(fan_in)`.
    """

    splits = ("validation", "test")
    metric = "accuracy"
    mode = "max"
    published: ClassVar = {
        "Wang et al. 2018 (LeNet on MNIST, from the project page)": "ten images, the same first weights 93.8 %; "
        "100 images, new first weights 79.5 ± 8.1 %",
        "Maclaurin et al. 2015 (softmax regression on MNIST)": "a picture, no figure",
    }

    hidden: int = 0
    first_weights: str = "new"
    rates: Literal["one", "step"] = "one"
    outer_batch_size: int = 1000
    num_steps: int = 20
    first_scale: float = 0.1
    weight_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("first_weights", self.first_weights, ("same", "new")),
            ("rates", self.rates, ("one", "step")),
        ):
            if value not in known:
                raise ExpectedFailure(
                    f"`experiment.{name}` is {value!r}, which this experiment does not know. Use {' or '.join(known)}."
                )
        self.images = self.digit_splits()
        inputs = self.images["train"].inputs
        self._net = MLP((inputs.shape[1], *([self.hidden] if self.hidden else []), CLASSES))
        # Built as it is set, for the checks of its numbers.
        self._dynamics = replace(build(self.config, "dynamics"), lr=ht.Hyper("log_lr", torch.exp, per=self.rates))
        lr = positive_number(self.config, "dynamics.lr", purpose="its logarithm is learnt", example=0.1)
        noise = torch.randn((CLASSES, inputs.shape[1]), generator=torch.Generator().manual_seed(self.settings.seed))
        self._num_rates = self.num_steps if self.rates == "step" else None
        self._first = self._hparams(self.first_scale * noise.to(inputs), lr)
        self._same = self.first_weights == "same"
        self._chosen: dict[str, TensorDict] = {}

    def training(self) -> ht.ProblemSource:
        """Returns runs on the learnt images, each judged on a new batch of real training images."""
        train = TensorDataset(*self.images["train"].pairs())
        batches = ht.Minibatches(train, self.outer_batch_size, seed=self.settings.seed)
        return self._runs("training", batches)

    def validation(self) -> ht.ProblemSource:
        """Returns runs on the learnt images, judged on all validation images."""
        return self._runs("validation", self._all("validation"))

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns runs on the learnt images, judged on all images of a split; with a seed, from new first weights."""
        return self._runs("evaluation", self._all(split), seed=seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns runs on the first training image of each class, and on the mean of each class.

        The learning rate of either is the one of `_RATES` that is best on the validation images.
        """
        if not self._chosen:
            of_class = [self.images["train"].inputs[self.images["train"].labels == digit] for digit in range(CLASSES)]
            kinds = {
                "real images": torch.stack([images[0] for images in of_class]),
                "class means": torch.stack([images.mean(dim=0) for images in of_class]),
            }
            self._chosen = {name: self._with_best_rate(images) for name, images in kinds.items()}
        source = self.evaluation(split)
        return {name: Baseline(source=source, hparams=hparams) for name, hparams in self._chosen.items()}

    def pictures(self, hparams: TensorDict) -> TensorDict:
        """Returns the ten images in a row: grey is 0, the largest entry of either sign black or white."""
        images = hparams["images"]
        side = round(images.shape[1] ** 0.5)
        row = images.reshape(CLASSES, side, side).transpose(0, 1).reshape(1, side, CLASSES * side)
        return {"images": (row / row.abs().max().clamp(min=1e-12) / 2 + 0.5).clamp(0.0, 1.0)}

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the learnt images."""
        layers = len(self._net.widths) - 1
        net = "softmax regression" if layers == 1 else f"a net with {self._net.widths[1]} hidden units"
        weights = "the same first weights in every run" if self._same else "first weights drawn anew for every run"
        rate = f"{float(hparams['log_lr'].exp().mean()):.2g}{' (mean of all steps)' if self._num_rates else ''}"
        title = f"All that {net} is trained on, for {self.num_steps} steps at the learnt rate {rate}\n({weights})"
        draw_row(hparams["images"], title, folder / "distilled.png")

    def _hparams(self, images: Tensor, lr: float) -> TensorDict:
        """Returns the outer variables of ten images and a learning rate."""
        log_lr = images.new_tensor(math.log(lr))
        return {"images": images, "log_lr": log_lr if self._num_rates is None else log_lr.repeat(self._num_rates)}

    def _with_best_rate(self, images: Tensor) -> TensorDict:
        source, candidates = self.validation(), [self._hparams(images, lr) for lr in _RATES]
        runs = 1 if self._same else 5
        scores = [ht.evaluate(source, each, num_episodes=runs).metrics["accuracy"].mean for each in candidates]
        return candidates[scores.index(max(scores))]

    def _all(self, split: str) -> Callable[[int], Batch]:
        return lambda _: self.images[split].pairs()

    def _runs(self, purpose: Purpose, judged: Callable[[int], Batch], *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the one problem of the same first weights, or one with first weights of its own for every step."""
        inner = OnLearntImages(self._net, self.weight_scale)
        outer = CleanImages(data=judged, first=self._first, figures=mean_rate, net=self._net)

        def problem(own: int) -> ht.BilevelProblem:
            return ht.BilevelProblem(inner, outer, dynamics=self._dynamics, num_steps=self.num_steps, seed=own)

        if self._same and seed is None:
            return problem(run_seed(self.settings.seed, "training", 0))
        return self.reseeded(purpose, problem, seed=seed)


class OnLearntImages(ht.InnerProblem):
    """Trains a net on the learnt images, the digits 0 to 9 in this order.

    Args:
        net: the net.
        scale: standard deviation of its first weights (unit: `1/sqrt(fan_in)`).
    """

    def __init__(self, net: MLP, scale: float = 1.0) -> None:
        self._net = net
        self._scale = scale

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights."""
        return {name: self._scale * value for name, value in self._net.draw(hparams["images"]).items()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy on the learnt images."""
        images = hparams["images"]
        return F.cross_entropy(self._net(params, images), torch.arange(CLASSES, device=images.device))


def mean_rate(hparams: TensorDict) -> TensorDict:
    """Returns the learning rate, or the mean of those of all steps."""
    return {"rate": hparams["log_lr"].exp().mean()}


def draw_row(images: Tensor, title: str, path: Path) -> None:
    """Draws the ten images in a row: red above 0, blue below, white at 0.

    Args:
        images: shape `(10, pixels)`, the digits 0 to 9.
        title: above them.
        path: the picture.
    """
    images = images.detach().cpu()
    side, most = round(images.shape[1] ** 0.5), float(images.abs().max())
    figure = Figure(figsize=(11, 2.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    cells = figure.subplots(1, len(images))
    for digit, (cell, image) in enumerate(zip(cells, images, strict=True)):
        shown = cell.imshow(image.reshape(side, side).numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        cell.set_title(f"{digit}", fontsize=10)
        cell.set(xticks=[], yticks=[])
    bar = figure.colorbar(shown, ax=cells, fraction=0.02, pad=0.01)
    bar.set_label("pixel (ink is 1)", fontsize=9)
    figure.savefig(path, dpi=100)
