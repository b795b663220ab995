"""How strongly each weight of a linear classifier is to be penalised: one L2 penalty for every pixel and class.

scripts/train experiment=pixel_penalty
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.data_sets.digits import CLASSES
from experiments.common.models.labelled_images import CleanImages, first_params, logits
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline, refuse_other_problems
from hypertorch.types import Batch, TensorDict

_SINGLE = tuple(10.0 ** (power / 2) for power in range(-10, 1))  # what the best single penalty is chosen from
_NONE = 1e-30  # has a logarithm


@dataclass(eq=False, repr=False, kw_only=True)
class PixelPenalty(DigitsExperiment):
    """Learns an L2 penalty for each weight of softmax regression, through all of training, by the validation loss.

    It is compared with the best single penalty for all weights, chosen on the validation images.

    Args:
        sizes: images for "train", "validation" and "test"; 0 for all that are left over.
        batch_size: images in a minibatch.
        num_steps: the horizon (unit: inner steps).
        l2: every penalty before the first outer step.
    """

    splits = ("validation", "test")
    metric = "outer_loss"
    mode = "min"
    published: ClassVar = {
        "Maclaurin et al. 2015, section 3.3": "a picture of the learnt penalties, no figures",
    }

    batch_size: int = 200
    num_steps: int = 50
    l2: float = 1e-3

    def __post_init__(self) -> None:
        self.images = self.digit_splits()
        self._dynamics: ht.Dynamics = build(self.config, "dynamics")
        if not 0.0 < self.l2 < float("inf"):
            raise ExpectedFailure(
                f"`experiment.l2` is {self.l2}, but its logarithm is learnt: it must be above 0. Use for instance 1e-3."
            )
        self._first = self._constant(self.l2)

    def training(self) -> ht.ProblemSource:
        """Returns the run, judged on the validation images."""
        return self._run("validation")

    def validation(self) -> ht.ProblemSource:
        """Returns the same."""
        return self._run("validation")

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the run, judged on a split.

        Raises:
            ExpectedFailure: if other problems are asked for: there are none.
        """
        refuse_other_problems(seed)
        return self._run(split)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns the first penalty, the best single one by the validation loss, and none; also on more images.

        The learnt penalties have seen the validation images, so one baseline of the test is trained on these too.
        """
        best = min(_SINGLE, key=lambda l2: float(ht.unroll(self._run("validation"), self._constant(l2)).outer_loss))
        constants = {"the first penalty": self.l2, "no penalty": _NONE, "best single penalty": best}
        found = {name: Baseline(source=self._run(split), hparams=self._constant(l2)) for name, l2 in constants.items()}
        if split == "test":
            source = self._run(split, trained_on=("train", "validation"))
            found["no penalty, trained on the validation images too"] = Baseline(
                source=source, hparams=self._constant(_NONE)
            )
        return found

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the penalties of each digit's weights where their pixels are."""
        draw_penalties(hparams["log_l2"].detach().exp(), self.images["train"].inputs, folder / "penalties.png")

    def _constant(self, l2: float) -> TensorDict:
        like = self.images["train"].inputs
        return {"log_l2": like.new_full((CLASSES, like.shape[1]), math.log(l2))}

    def _run(self, split: str, trained_on: tuple[str, ...] = ("train",)) -> ht.BilevelProblem:
        pairs = [self.images[name].pairs() for name in trained_on]
        images = TensorDataset(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))
        pixels = self.images[split].inputs.shape[1]
        first = first_params(pixels, hidden=0, generator=torch.Generator())
        return ht.BilevelProblem(
            PenalisedTraining(
                ht.Minibatches(images, self.batch_size, seed=self.settings.seed),
                {name: value.to(images.tensors[0]) for name, value in first.items()},
            ),
            CleanImages(data=self.images[split].pairs(), first=self._first),
            dynamics=self._dynamics,
            num_steps=self.num_steps,
            seed=self.settings.seed,
        )


class PenalisedTraining(ht.InnerProblem):
    """Trains softmax regression with a penalty on each weight.

    Args:
        batches: images and labels of an inner step.
        first: the first params.
    """

    def __init__(self, batches: ht.Minibatches, first: TensorDict) -> None:
        self._batches = batches
        self._first = first

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the first params, which are zero."""
        return dict(self._first)

    def batch(self, step: int) -> Batch:
        """Returns images and labels."""
        return self._batches(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy and `sum_ij exp(log_l2_ij) w_ij^2 / 2`; biases have no penalty."""
        images, labels = batch
        penalty = (hparams["log_l2"].exp() * params["output.weight"].square()).sum() / 2
        return F.cross_entropy(logits(params, images), labels) + penalty


def draw_penalties(penalties: Tensor, inputs: Tensor, path: Path) -> None:
    """Draws each penalty at the place of its pixel: of each digit's weights, and their geometric mean over digits.

    Args:
        penalties: shape `(classes, pixels)`.
        inputs: the training images, shape `(images, pixels)`: a pixel without ink in all of them is left white, as its
            weights stay zero whatever their penalty.
        path: the picture.
    """
    side = round(inputs.shape[1] ** 0.5)
    logs = penalties.log10().masked_fill((inputs == 0).all(dim=0), math.nan).cpu()
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    places = figure.subplot_mosaic("MM01234;MM56789")
    panels = {"geometric mean over all digits": (places["M"], logs.mean(dim=0))}
    panels |= {f"digit {digit}": (places[f"{digit}"], own) for digit, own in enumerate(logs)}
    least, greatest = (float(value) for value in logs[~logs.isnan()].quantile(torch.tensor([0.01, 0.99]).to(logs)))
    for title, (axes, own) in panels.items():
        shown = axes.imshow(own.reshape(side, side).numpy(), cmap="viridis", vmin=least, vmax=greatest)
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=list(places.values()), label="decimal logarithm of the L2 penalty")
    figure.savefig(path, dpi=100)
