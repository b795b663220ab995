"""Which labels are wrong: data hyper-cleaning, with one learnt weight for each training image.

scripts/train experiment=data_cleaning
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.settings import ProblemSettings
from experiments.common.data_sets.digits import CLASSES, DigitsName, Images, digit_splits
from experiments.common.models.labelled_images import CleanImages, WeightedImages, first_params
from experiments.common.results.image_grid import draw_image_grid
from experiments.common.runs.experiment import Baseline, Experiment, refuse_other_problems
from hypertorch.types import TensorDict

_GRID = (4, 9)


class DataCleaning(Experiment):
    """Learns a weight for each training image, many of which have a wrong label, by the loss on clean images.

    The inner problem is softmax regression on the weighted training images. For the test, the classifier is trained
    again on the weighted training images and the validation images together, for `retrain_steps` steps; baselines too.
    `test_training_alone` judges on the test images what was trained on the weighted training images alone.

    Args:
        config: the configuration, for the group `dynamics`.
        settings: the plain settings of all experiments.
        data: "digits" (scikit-learn's, embedded) or "mnist".
        root: MNIST's folder.
        num_training: images with a learnt weight.
        num_validation: images with true labels, by which the weights are learnt.
        num_test: images with true labels for the test; 0 for all that are left.
        wrong_share: share of the training images whose label is replaced by another one, drawn uniformly.
        weights: what a weight is: "box" (a number in [0, 1], the sum bounded) or "sigmoid" (of any number).
        mean_bound: "box" alone: greatest mean of all weights, which is also their first value.
        num_steps: the horizon while weights are learnt (unit: steps).
        warm_start: whether the classifier goes on from outer step to outer step.
        retrain_steps: of the final training, and of the validation on the way there (unit: steps).
        l2: strength of the penalty on the classifier's params.
    """

    READS: ClassVar = Reads(blocks=("dynamics",))
    # What precedes the test is what a sweep goes by, so that the other view of the test images comes first.
    splits = ("test_training_alone", "validation", "test")
    # Accuracies of two runs differ by a few images; the loss shows more.
    metric = "outer_loss"
    mode = "min"
    published: ClassVar = {
        "oracle (quoted from memory)": "accuracy 90.46 %",
        "baseline (quoted from memory)": "accuracy 87.74 %",
        "sum of weights at most 1500 (quoted from memory)": "accuracy 90.06 %, F1 0.9244",
    }

    def __init__(
        self,
        config: DictConfig,
        settings: ProblemSettings,
        *,
        data: DigitsName = "digits",
        root: str | None = None,
        num_training: int = 500,
        num_validation: int = 500,
        num_test: int = 0,
        wrong_share: float = 0.5,
        weights: str = "box",
        mean_bound: float | None = 0.3,
        num_steps: int = 40,
        warm_start: bool = False,
        retrain_steps: int = 2000,
        l2: float = 0.0,
    ) -> None:
        super().__init__(config, settings)
        self._form = weight_form(weights, num_training, mean_bound)
        sizes = {"training": num_training, "validation": num_validation, "test": num_test}
        options = {"seed": settings.seed, "device": settings.device, "dtype": settings.dtype}
        self._images = digit_splits(data, sizes, root=root, **options)
        self._given = with_wrong_labels(self._images["training"].labels, wrong_share, seed=settings.seed)
        self._dynamics = build(config, "dynamics")
        self._num_steps, self._retrain_steps = num_steps, retrain_steps
        self._warm_start, self._l2 = warm_start, l2

    def training(self) -> ht.ProblemSource:
        """Returns the problem of training on the weighted images, judged on the validation images."""
        return self._problem("validation", self._num_steps, learning=True)

    def validation(self) -> ht.ProblemSource:
        """Returns the same, trained for longer."""
        return self._problem("validation", self._retrain_steps)

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the problem of training again, judged on a split; for the test, on the validation images too.

        Raises:
            ExpectedFailure: if other problems are asked for: there are none.
        """
        refuse_other_problems(seed)
        return self._problem(split, self._retrain_steps)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns training with equal weights, with those of right labels alone, and on the validation images alone."""
        right = (self._given == self._images["training"].labels).to(self._images["training"].inputs.dtype)
        chosen = {"all weights one": torch.ones_like(right), "right labels alone": right}
        if split == "test":
            chosen["validation images alone"] = torch.zeros_like(right)
        source = self._problem(split, self._retrain_steps)
        return {
            name: Baseline(source=source, hparams={"weight": self._form.inverse(weights)})
            for name, weights in chosen.items()
        }

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the weights of right and wrong labels, and the images with the least weights."""
        weights = self._form.weights(hparams["weight"].detach())
        draw_weights(weights, self._form.threshold, self._images["training"], self._given, folder / "weights.png")

    def _problem(self, split: str, num_steps: int, *, learning: bool = False) -> ht.BilevelProblem:
        images, form = self._images["training"], self._form
        inputs, labels = images.inputs, self._given
        clean = self._images["validation"] if split == "test" else self._images["validation"][:0]
        judged = self._images["validation" if split == "validation" else "test"]
        first = first_params(inputs.shape[1], hidden=0, generator=torch.Generator())
        is_wrong = self._given != images.labels
        return ht.BilevelProblem(
            CleanedImages(
                inputs=torch.cat([inputs, clean.inputs]),
                labels=torch.cat([labels, clean.labels]),
                first={name: value.to(inputs) for name, value in first.items()},
                form=form,
                strength=self._l2,
                scale=1.0 / form.first if learning else None,
            ),
            CleanImages(
                data=judged.pairs(),
                first={"weight": form.inverse(inputs.new_full((len(images),), form.first))},
                constraints=form.constraints(),
                figures=lambda hparams: {"F1": f1(form.detected(hparams["weight"]), is_wrong).to(inputs)},
            ),
            dynamics=self._dynamics,
            num_steps=num_steps,
            warm_start=learning and self._warm_start,
            seed=self.settings.seed,
        )


@dataclass(frozen=True, kw_only=True)
class WeightForm(ABC):
    """What the outer variable `weight` is: how it becomes the weights of the images, which lie in [0, 1].

    Attributes:
        threshold: a label counts as detected to be wrong where the weight of its image is below.
        first: every weight before the first outer step.
    """

    threshold: float
    first: float

    @abstractmethod
    def weights(self, variable: Tensor) -> Tensor:
        """Returns the weights, of the shape of the variable: `(images,)`."""

    @abstractmethod
    def inverse(self, weights: Tensor) -> Tensor:
        """Returns the variable that has these weights."""

    @abstractmethod
    def constraints(self) -> Mapping[str, ht.Constraint]:
        """Returns the set that the variable is kept in."""

    def detected(self, variable: Tensor) -> Tensor:
        """Returns whose labels count as wrong, of the shape of the variable."""
        return self.weights(variable) < self.threshold


@dataclass(frozen=True, kw_only=True)
class BoxWeights(WeightForm):
    """The weights themselves, each in [0, 1], with a bound on their sum: most of the wrong ones end at exactly 0.

    Args:
        total: the bound.
    """

    total: float
    threshold: float = 1e-3

    def weights(self, variable: Tensor) -> Tensor:
        """Returns the variable."""
        return variable

    def inverse(self, weights: Tensor) -> Tensor:
        """Returns the weights."""
        return weights

    def constraints(self) -> Mapping[str, ht.Constraint]:
        """Returns the box with the bounded sum."""
        return {"weight": ht.BoundedSum(total=self.total)}


@dataclass(frozen=True, kw_only=True)
class SigmoidWeights(WeightForm):
    """The sigmoid of the variable, which is free."""

    threshold: float = 0.5
    first: float = 0.5

    def weights(self, variable: Tensor) -> Tensor:
        """Returns the sigmoid."""
        return variable.sigmoid()

    def inverse(self, weights: Tensor) -> Tensor:
        """Returns the logits, those of 0 and 1 cut at -16 and 16 (a weight of 1e-7)."""
        return weights.logit().clamp(-16.0, 16.0)

    def constraints(self) -> Mapping[str, ht.Constraint]:
        """Returns nothing: any number is a weight."""
        return {}


def weight_form(name: str, num_weights: int, mean_bound: float | None) -> WeightForm:
    """Returns the form of weights that a setting names.

    Args:
        name: "box" or "sigmoid".
        num_weights: how many there are.
        mean_bound: greatest mean of the weights in a box; None with "sigmoid".

    Raises:
        ExpectedFailure: if there is no such form, or the bound does not fit it.
    """
    if name == "sigmoid":
        if mean_bound is not None:
            raise ExpectedFailure(
                f"`experiment.mean_bound` is {mean_bound}, but `experiment.weights=sigmoid` has no bound: it would do "
                "nothing. Write experiment.mean_bound=null."
            )
        return SigmoidWeights()
    if name != "box":
        raise ExpectedFailure(f"`experiment.weights` is {name!r}, which is no form of weights. Use box or sigmoid.")
    if mean_bound is None or not 0.0 < mean_bound <= 1.0:
        raise ExpectedFailure(
            f"`experiment.mean_bound` is {mean_bound}, but weights in a box of [0, 1] start at it, and it bounds their "
            "mean. Give a number above 0 and at most 1."
        )
    return BoxWeights(total=mean_bound * num_weights, first=mean_bound)


class CleanedImages(WeightedImages):
    """Trains the classifier on the weighted images, and on clean ones if there are more images than weights.

    Args:
        inputs: of shape `(images, pixels)`.
        labels: as given, of shape `(images,)`.
        first: the first params.
        form: of the weights.
        strength: of the penalty.
        scale: what the weights are multiplied by; None for the reciprocal of their mean, by which a step has the same
            size whatever the weights.
    """

    def __init__(
        self,
        *,
        inputs: Tensor,
        labels: Tensor,
        first: TensorDict,
        form: WeightForm,
        strength: float,
        scale: float | None,
    ) -> None:
        super().__init__(data=(inputs, labels, torch.arange(len(labels), device=labels.device)), first=first)
        self._form, self._strength, self._scale = form, strength, scale

    def weights(self, hparams: TensorDict, losses: Tensor, source: Tensor) -> Tensor:
        """Returns the weights; that of a clean image is the others' largest, or 1 if no label counts as right."""
        own = self._form.weights(hparams["weight"])
        num_clean = len(source) - len(own)
        if num_clean:
            largest = own.max()
            # By the threshold: no sigmoid is exactly 0.
            clean = torch.where(largest < self._form.threshold, 1.0, largest)
            own = torch.cat([own, clean.expand(num_clean)])
        return own * self._scale if self._scale is not None else own / own.mean()

    def l2(self, hparams: TensorDict) -> float:
        """Returns the strength of the penalty, which is not learnt."""
        return self._strength


def with_wrong_labels(labels: Tensor, share: float, *, seed: int) -> Tensor:
    """Returns the labels with a share of them replaced by another one, drawn uniformly from the other classes.

    Args:
        labels: the true ones, shape `(images,)`.
        share: of the images, in [0, 1].
        seed: of the draw.

    Raises:
        ExpectedFailure: if `share` is no share.
    """
    if not 0.0 <= share <= 1.0:
        raise ExpectedFailure(f"`experiment.wrong_share` is {share}, which is no share. Give a number from 0 to 1.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))].to(labels.device)
    shift = torch.randint(1, CLASSES, (len(chosen),), generator=generator).to(labels.device)
    return labels.index_copy(0, chosen, (labels[chosen] + shift) % CLASSES)


def f1(found: Tensor, wrong: Tensor) -> Tensor:
    """Returns the F1 of a search for wrong labels, `2 |found and wrong| / (|found| + |wrong|)`; 0 where both are empty.

    Args:
        found: whose labels count as wrong, shape `(images,)`.
        wrong: whose labels are wrong.
    """
    return 2.0 * (found & wrong).sum() / (found.sum() + wrong.sum()).clamp(min=1)


def draw_weights(weights: Tensor, threshold: float, images: Images, given: Tensor, path: Path) -> None:
    """Draws the weights of right and wrong labels, and the images with the least weights.

    Args:
        weights: of the training images, shape `(images,)`.
        threshold: below which a label counts as wrong.
        images: the training images with their true labels.
        given: the labels given.
        path: the picture.
    """
    wrong = given != images.labels
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.0, 1.5])[0]
    axes = left.subplots()
    kinds = {"right label": (~wrong, "tab:green"), "wrong label": (wrong, "tab:red")}
    axes.hist(
        [weights[which].cpu().numpy() for which, _ in kinds.values()],
        bins=np.linspace(0.0, 1.0, 21).tolist(),
        color=[color for _, color in kinds.values()],
        label=list(kinds),
        stacked=True,
    )
    axes.axvline(threshold, color="black", linestyle="--", label=f"below {threshold:g}: detected")
    axes.set(xlabel="learnt weight", ylabel="training images")
    axes.legend(fontsize=9)
    right.suptitle("images with the least weights: the label given, and the true one where it is another", fontsize=9)
    least = weights.argsort(stable=True)[: _GRID[0] * _GRID[1]]
    draw_image_grid(right, _GRID, images.inputs[least], given[least], images.labels[least])
    figure.savefig(path, dpi=110)
