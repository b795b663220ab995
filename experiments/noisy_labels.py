"""Which labels to learn from: a small net that turns a training loss into a weight, learnt along with the classifier.

scripts/train experiment=noisy_labels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.data_sets.digits import CLASSES
from experiments.common.models.labelled_images import CleanImages, WeightedImages
from experiments.common.models.mlp import MLP
from experiments.common.results.learning_curve import logged
from experiments.common.results.line_styles import COLOURS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline, refuse_other_problems
from hypertorch.types import Batch, TensorDict, TensorMapping

NetName: TypeAlias = Literal["mlp", "conv"]
"""One hidden layer, or two convolutional layers."""

_WEIGHT_NET = MLP((1, 100, 1), torch.relu)
_LEAST_LOSS = 1e-3  # in the picture, whose lowest bin holds all below
_STOPS = 40  # numbers of steps that validation chooses the baselines from


@dataclass(eq=False, repr=False, kw_only=True)
class NoisyLabels(DigitsExperiment):
    """Learns a weight net: from the loss of a training image to its weight. Many labels are flipped to one other class.

    The classifier is trained once: each outer step goes on from where the last one stopped, by one step on the weighted
    training images, and moves the weight net along the hypergradient of the loss on a few clean images. This classifier
    is what is judged, as the last step leaves it. The baselines have as many steps, and are stopped where they are best
    on the validation images. The validation of the run is a new training with the last weight net held fixed.

    Args:
        sizes: images for "train" (of which labels are flipped), "clean" (by which the weight net is learnt),
            "validation" (which stop the baselines) and "test"; 0 for all that are left over.
        flipped_share: share of the training images whose label is flipped to the one other class that belongs to its
            class.
        net: the classifier, "mlp" or "conv".
        hidden: its hidden units, or the channels of its convolutional layers.
        batch_size: training images of a step.
        outer_batch_size: clean images of an outer step.
        warm_up: steps in which all images weigh 1/2, before the weight net is used (unit: steps).
        final_steps: the horizon of a new training (unit: steps).
    """

    splits = ("validation", "test")
    metric = "accuracy"
    mode = "max"
    published: ClassVar = {
        "Meta-Weight-Net (CIFAR-10, ResNet-32, 40 % flipped; Shu et al. 2019, quoted from memory)": "87.5 %",
    }

    flipped_share: float = 0.4
    net: NetName = "mlp"
    hidden: int = 128
    batch_size: int = 100
    outer_batch_size: int = 100
    warm_up: int = 200
    final_steps: int = 4000

    def __post_init__(self) -> None:
        seed = self.settings.seed
        self._images = self.digit_splits()
        train = self._images["train"]
        self._noisy = train.inputs, with_flipped_labels(train.labels, self.flipped_share, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._net = ht.FunctionalModule(classifier(self.net, train.side, self.hidden).to(train.inputs))
            self._first_weights = first_weight_net(train.inputs)
        self._first_params = self._net.init_params()
        self._end: TensorDict | None = None  # params at the end of a run
        self._dynamics: ht.Dynamics = build(self.config, "dynamics")

    def training(self) -> ht.ProblemSource:
        """Returns one step of the run that goes on, judged on a few clean images."""
        clean = TensorDataset(*self._images["clean"].pairs())
        batches = ht.Minibatches(clean, self.outer_batch_size, seed=self.settings.seed)
        others = {"validation_accuracy": self._images["validation"].pairs()}
        # Without the steps of equal weights: the outer rate is 0 there, and the first weights are all near 1/2.
        return self._problem(self._noisy, batches, num_steps=1, warm_up=0, warm_start=True, others=others)

    def validation(self) -> ht.ProblemSource:
        """Returns a new training with a weight net that is held fixed."""
        return self.evaluation("validation")

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns no further step after a run; before it, a new training with a weight net that is held fixed.

        Raises:
            ExpectedFailure: if other problems are asked for: there are none.
        """
        refuse_other_problems(seed)
        return self._trained(self._noisy, split, self.final_steps if self._end is None else 0, self._end)

    def after(self, trained: ht.Trained) -> NoisyLabels:
        """Returns the experiment that judges and draws the classifier of the run."""
        found = copy(self)
        found._end = trained.params
        return found

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns training with equal weights: on the noisy, the true and the clean labels, each to its end or best."""
        true = self._images["train"].pairs()
        runs = {"equal weights, true labels": self._trained(true, split, self.final_steps)}
        for name, (images, stop) in self._stopped.items():
            runs[f"{name}, best step"] = self._trained(images, split, stop)
        return {name: Baseline(source=source, hparams=self._equal_weights()) for name, source in runs.items()}

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the weight over the loss, and the losses of right and flipped labels at the end of the run."""
        params = self.evaluation("validation").at(0).inner.init_params(hparams)
        with torch.no_grad():
            losses = F.cross_entropy(self._net(params, self._noisy[0]), self._noisy[1], reduction="none")
        is_flipped = self._noisy[1] != self._images["train"].labels
        draw_weights(hparams, losses, is_flipped, folder / "metrics.jsonl", folder / "weights.png")

    @cached_property
    def _stopped(self) -> Mapping[str, tuple[tuple[Tensor, Tensor], int]]:
        """Images and labels to train on with equal weights, and the number of steps with the best validation."""
        found = {}
        for name, images in (("equal weights", self._noisy), ("clean images alone", self._images["clean"].pairs())):
            stops = sorted({-(-self.final_steps * part // _STOPS) for part in range(1, _STOPS + 1)})
            run = self._trained(images, "validation", self.final_steps)
            figures = ht.unroll(run, self._equal_weights(), metrics_after=stops).metrics_after
            found[name] = images, stops[int(figures["accuracy"].argmax())]
        return found

    def _equal_weights(self) -> TensorDict:
        """Returns the weight net that gives every image a weight of 1 (less 1e-7)."""
        zero = {name: torch.zeros_like(value) for name, value in self._first_weights.items()}
        return {**zero, "layer2.bias": zero["layer2.bias"] + 16.0}

    def _trained(
        self, images: tuple[Tensor, Tensor], split: str, num_steps: int, first: TensorDict | None = None
    ) -> ht.BilevelProblem:
        judged = self._images[split].pairs()
        return self._problem(images, judged, num_steps=num_steps, warm_up=self.warm_up, first=first)

    def _problem(
        self,
        images: tuple[Tensor, Tensor],
        judged: tuple[Tensor, Tensor] | Callable[[int], Batch],
        *,
        num_steps: int,
        warm_up: int,
        warm_start: bool = False,
        first: TensorDict | None = None,
        others: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> ht.BilevelProblem:
        batches = ht.Minibatches(TensorDataset(*images), self.batch_size, seed=self.settings.seed)
        return ht.BilevelProblem(
            NetWeightedImages(
                data=lambda step: (*batches(step), torch.tensor(step < warm_up)),
                first=self._first_params if first is None else first,
                net=self._net,
            ),
            CleanImages(data=judged, first=self._first_weights, others=others, net=self._net),
            dynamics=self._dynamics,
            num_steps=num_steps,
            warm_start=warm_start,
            seed=self.settings.seed,
        )


class NetWeightedImages(WeightedImages):
    """Trains the classifier on images that the weight net weighs by their loss; 1/2 each while the run warms up."""

    def weights(self, hparams: TensorDict, losses: Tensor, source: Tensor) -> Tensor:
        """Returns the weights. `source` says whether the step is one of the warm-up, shape `()`."""
        # The loss says how an image fares; the classifier is not to raise a weight by it.
        return torch.where(source, 0.5, weights_of(hparams, losses.detach()))

    def l2(self, hparams: TensorDict) -> None:
        """Returns that there is no penalty."""
        return


def weights_of(weight_net: TensorMapping, losses: Tensor) -> Tensor:
    """Returns the weights of images with these losses, in (0, 1), of the same shape: `(images,)`."""
    return _WEIGHT_NET(weight_net, losses[:, None])[:, 0].sigmoid()


def first_weight_net(like: Tensor) -> TensorDict:
    """Returns a weight net that gives every image a weight near 1/2, drawn from torch's default generator.

    Args:
        like: a tensor of its dtype and device.
    """
    drawn = _WEIGHT_NET.draw(like)
    # Not zero: the layer before would have no hypergradient until this one has moved.
    return {**drawn, "layer2.weight": 0.01 * drawn["layer2.weight"]}


def classifier(name: NetName, side: int, hidden: int) -> nn.Module:
    """Returns a net for flattened square images, with random weights from torch's default generator.

    Args:
        name: "mlp" or "conv".
        side: of the images (unit: pixels).
        hidden: hidden units, or channels.

    Raises:
        ExpectedFailure: if there is no such net.
    """
    if name == "mlp":
        return nn.Sequential(nn.Linear(side**2, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))
    if name != "conv":
        raise ExpectedFailure(f"`experiment.net` is {name!r}, which is no classifier. Use mlp or conv.")
    blocks = [
        layer
        for channels in (1, hidden)
        for layer in (nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    last = nn.Linear(hidden * (side // 4) ** 2, CLASSES)
    return nn.Sequential(nn.Unflatten(1, (1, side, side)), *blocks, nn.Flatten(), last)


def with_flipped_labels(labels: Tensor, share: float, *, seed: int) -> Tensor:
    """Returns the labels with a share of them flipped: every class to one other class, which is always the same.

    Args:
        labels: the true ones, shape `(images,)`.
        share: of the images, in [0, 1].
        seed: of the choice of images, and of the other class of each class.

    Raises:
        ExpectedFailure: if `share` is no share.
    """
    if not 0.0 <= share <= 1.0:
        raise ExpectedFailure(f"`experiment.flipped_share` is {share}, which is no share. Give a number from 0 to 1.")
    generator = torch.Generator().manual_seed(seed)
    circle = torch.randperm(CLASSES, generator=generator)
    # On a circle of all classes, each goes to its neighbour: never to itself.
    other = torch.empty_like(circle).index_copy(0, circle, circle.roll(1)).to(labels.device)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))].to(labels.device)
    return labels.index_copy(0, chosen, other[labels[chosen]])


def draw_weights(weight_net: TensorMapping, losses: Tensor, is_flipped: Tensor, metrics: Path, path: Path) -> None:
    """Draws the weight over the loss, how many right and flipped labels have that loss, and the run's accuracy.

    Args:
        weight_net: the learnt one.
        losses: of the training images under the labels given, shape `(images,)`.
        is_flipped: whose label was flipped.
        metrics: the run's metrics.jsonl.
        path: the picture.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.3, 1.0))[0]
    above, below = left.subplots(2, 1, sharex=True)
    most = max(float(losses.max()), 1.0)
    grid = torch.logspace(math.log10(_LEAST_LOSS), math.log10(most), 200, dtype=losses.dtype, device=losses.device)
    with torch.no_grad():
        weights = weights_of(weight_net, grid)
    above.plot(grid.cpu().numpy(), weights.cpu().numpy(), color=COLOURS[0], linewidth=2.5)
    above.set_ylim(bottom=0.0)
    above.set(ylabel="learnt weight", title="The higher the loss of an image, the less it weighs")
    kinds = {"right label": (~is_flipped, COLOURS[2]), "flipped label": (is_flipped, COLOURS[1])}
    below.hist(
        [losses[which].clamp(min=_LEAST_LOSS).cpu().numpy() for which, _ in kinds.values()],
        bins=np.geomspace(_LEAST_LOSS, most, 31).tolist(),
        color=[colour for _, colour in kinds.values()],
        label=[f"{name} ({int(which.sum()):,})" for name, (which, _) in kinds.items()],
    )
    below.set(xlabel="loss of a training image under the label given", ylabel="training images", yscale="log")
    below.set_xscale("log")
    below.set_xlim(_LEAST_LOSS, most)
    below.legend(frameon=False, loc="upper center")
    curve = right.subplots()
    steps, validation = logged(metrics, "validation_accuracy")
    curve.plot(steps, [100 * value for value in validation], color=COLOURS[4])
    curve.set(
        xlabel="outer step", ylabel="accuracy on validation images (%)", title="The classifier, while it is trained"
    )
    for axes in (above, below, curve):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
