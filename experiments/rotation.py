"""By which angle the test images are rotated, found by gradient descent on the angle, through training.

scripts/train experiment=rotation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.configuration.building import build
from experiments.common.data_sets.digits import CLASSES, Images
from experiments.common.models.labelled_images import CleanImages
from experiments.common.models.mlp import MLP
from experiments.common.results.learning_curve import logged
from experiments.common.results.line_styles import COLOURS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline
from experiments.common.runs.seeds import Purpose
from hypertorch.types import Batch, TensorDict


@dataclass(eq=False, repr=False, kw_only=True)
class Rotation(DigitsExperiment):
    """Learns the angle by which upright training images must be rotated, so that a net knows rotated test images.

    Each outer step trains a new net for a few steps on new minibatches, and moves the angle along the hypergradient of
    the net's loss on rotated validation images. The final evaluation trains for longer, with the best angle.

    Args:
        sizes: images for "train", "validation" and "test"; 0 for all that are left over.
        hidden: width of the net's hidden layer.
        batch_size: images in a minibatch of an inner step.
        outer_batch_size: validation images in an outer step.
        num_steps: the horizon of an outer step (unit: inner steps).
        final_steps: the horizon of the final evaluation (unit: inner steps).
        true_angle: by which validation and test images are rotated (unit: degrees, counterclockwise).
    """

    splits = ("validation", "test")
    metric = "accuracy"
    mode = "max"
    published: ClassVar = {
        "EvoGrad (LeNet on MNIST; Bohdal et al. 2021, from the authors' notebook)": "rotated images 98.1 ± 0.3 %, "
        "angle 28.5 ± 5.2 degrees; without a learnt angle 81.8 ± 0.6 %",
    }

    hidden: int = 128
    batch_size: int = 128
    outer_batch_size: int = 500
    num_steps: int = 20
    final_steps: int = 800
    true_angle: float = 30.0

    def __post_init__(self) -> None:
        self.upright = self.digit_splits()
        self._angle = torch.tensor(self.true_angle, dtype=self.settings.dtype, device=self.settings.device)
        self.rotated = {
            split: Images(inputs=rotate(self.upright[split].inputs, self._angle), labels=self.upright[split].labels)
            for split in self.splits
        }
        self._net = MLP((self.upright["train"].inputs.shape[1], self.hidden, CLASSES), torch.relu)
        self._dynamics: ht.Dynamics = build(self.config, "dynamics")

    def training(self) -> ht.ProblemSource:
        """Returns short runs from new first weights, each judged on a new batch of rotated validation images."""
        held_out = TensorDataset(*self.rotated["validation"].pairs())
        batches = ht.Minibatches(held_out, self.outer_batch_size, seed=self.settings.seed)
        return self._runs("training", batches, num_steps=self.num_steps)

    def validation(self) -> ht.ProblemSource:
        """Returns short runs, judged on all rotated validation images."""
        return self._runs("validation", self._all("validation"), num_steps=self.num_steps)

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns long runs from new first weights, judged on all rotated images of a split."""
        return self._runs("evaluation", self._all(split), num_steps=self.final_steps, seed=seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns the same long runs on upright training images, and on images rotated by the true angle."""
        source = self.evaluation(split)
        return {
            "no rotation": Baseline(source=source, hparams={"angle": torch.zeros_like(self._angle)}),
            "true angle": Baseline(source=source, hparams={"angle": self._angle}),
        }

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws how the angle was found, and digits that are upright, rotated by it, and as in the test."""
        digits = torch.stack([(self.upright["test"].labels == digit).nonzero()[0, 0] for digit in range(CLASSES)])
        upright = self.upright["test"].inputs[digits]
        rows = {
            "upright": upright,
            f"rotated by\nthe learnt {float(hparams['angle']):.1f}°": rotate(upright, hparams["angle"]),
            f"as in the test\n({float(self._angle):.0f}°, hidden)": self.rotated["test"].inputs[digits],
        }
        draw_angle(folder / "metrics.jsonl", float(self._angle), rows, folder / "rotation.png")

    def _all(self, split: str) -> Callable[[int], Batch]:
        return lambda _: self.rotated[split].pairs()

    def _runs(
        self, purpose: Purpose, judged: Callable[[int], Batch], *, num_steps: int, seed: int | None = None
    ) -> ht.ProblemSource:
        """Returns a run with first weights and minibatches of its own for every outer step."""
        train = TensorDataset(*self.upright["train"].pairs())

        def problem(own: int) -> ht.BilevelProblem:
            return ht.BilevelProblem(
                RotatedTraining(net=self._net, batches=ht.Minibatches(train, self.batch_size, seed=own)),
                CleanImages(data=judged, first={"angle": torch.zeros_like(self._angle)}, figures=angle, net=self._net),
                dynamics=self._dynamics,
                num_steps=num_steps,
                seed=own,
            )

        return self.reseeded(purpose, problem, seed=seed)


class RotatedTraining(ht.InnerProblem):
    """Trains a net on upright images, after rotating them by the learnt angle.

    Args:
        net: the net.
        batches: upright images and labels of an inner step.
    """

    def __init__(self, *, net: MLP, batches: ht.Minibatches) -> None:
        self._net = net
        self._batches = batches

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights."""
        return self._net.draw(hparams["angle"])

    def batch(self, step: int) -> Batch:
        """Returns upright images and labels."""
        return self._batches(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy on rotated images."""
        images, labels = batch
        return F.cross_entropy(self._net(params, rotate(images, hparams["angle"])), labels)


def angle(hparams: TensorDict) -> TensorDict:
    """Returns the angle (unit: degrees)."""
    return {"angle": hparams["angle"]}


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Returns square images rotated about their centre, by bilinear interpolation; what comes from outside is 0.

    `F.grid_sample` does the same, but has no forward-mode derivative, and repeats for every image what the images
    share.

    Args:
        images: shape `(images, pixels)`.
        degrees: the angle, counterclockwise, shape `()`.
    """
    side = round(images.shape[1] ** 0.5)
    # With a frame of zeros, whose outer edge stands for all that is outside.
    framed = F.pad(images.reshape(-1, side, side), (1, 1, 1, 1)).flatten(1)
    offsets = torch.arange(side, dtype=images.dtype, device=images.device) - (side - 1) / 2
    rows, columns = torch.meshgrid(offsets, offsets, indexing="ij")
    cos, sin = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    # Where each pixel comes from: rows count downwards, so a turn back by the angle has these signs.
    row = (cos * rows + sin * columns + (side + 1) / 2).clamp(0, side + 1).flatten()
    column = (cos * columns - sin * rows + (side + 1) / 2).clamp(0, side + 1).flatten()
    # The four pixels around that place are constants; how much each counts depends on the angle.
    above, left = row.detach().long().clamp(max=side), column.detach().long().clamp(max=side)
    down, right = row - above, column - left
    corner = above * (side + 2) + left
    return (
        (1 - down) * (1 - right) * framed[:, corner]
        + (1 - down) * right * framed[:, corner + 1]
        + down * (1 - right) * framed[:, corner + side + 2]
        + down * right * framed[:, corner + side + 3]
    )


def draw_angle(metrics: Path, true_angle: float, rows: Mapping[str, Tensor], path: Path) -> None:
    """Draws angle and accuracy over the outer steps, and rows of images below.

    Args:
        metrics: the run's metrics.jsonl.
        true_angle: the hidden angle (unit: degrees).
        rows: images by what they show, shape `(images, pixels)`.
        path: the picture.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1), squeeze=False)[:, 0]
    left, right = above.subplots(1, 2)
    left.axhline(true_angle, color=COLOURS[6], linestyle="--", linewidth=1, label="hidden angle of the test images")
    left.plot(*logged(metrics, "angle"), color=COLOURS[0], linewidth=2.5, label="learnt angle")
    left.set(xlabel="outer step", ylabel="angle (degrees)", title="The angle is learnt by gradient descent")
    left.legend(loc="lower right", frameon=False)
    steps, values = logged(metrics, "validation/accuracy")
    right.plot(steps, [100 * value for value in values], color=COLOURS[1], linewidth=2.5, marker="o")
    right.set(xlabel="outer step", ylabel="accuracy (%)", title="Rotated images, after a short training run")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
    side = round(next(iter(rows.values())).shape[1] ** 0.5)
    cells = below.subplots(len(rows), CLASSES, squeeze=False)
    for line, (label, images) in zip(cells, rows.items(), strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
        for cell, image in zip(line, images.detach().cpu(), strict=True):
            cell.imshow(image.reshape(side, side).numpy(), cmap="gray_r", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
    figure.savefig(path, dpi=100)
