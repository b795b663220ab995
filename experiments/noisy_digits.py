"""Which labellers to trust: data hyper-cleaning on scikit-learn's scanned digits.

scripts/train experiment=noisy_digits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from torch import Tensor

import hypertorch as ht
from experiments.common.configuration.building import build
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.settings import ProblemSettings
from experiments.common.data_sets.digits import CLASSES
from experiments.common.models.labelled_images import CleanImages, WeightedImages, first_params
from experiments.common.results.image_grid import draw_image_grid
from experiments.common.runs.experiment import Baseline, Experiment, refuse_other_problems
from hypertorch.types import Batch, TensorDict

_SIDE = 8
_PIXELS = _SIDE**2
_ROWS, _COLUMNS = 3, 6
_DARKEST = 16.0


class NoisyDigits(Experiment):
    """Learns how far to trust each labeller of the training scans, and an L2 penalty.

    Args:
        config: the configuration, for the group `dynamics`.
        settings: the plain settings of all experiments.
        num_steps: the horizon (unit: steps).
        num_labellers: how many there are; with `scans_each=1` every scan has a weight of its own.
        scans_each: scans that each has labelled.
        num_validation: scans with true labels, by which the trust is learnt; those left over are the test.
        most_wrong: share of random labels of the worst labeller; the others' grow up to it.
        hidden: width of the classifier's hidden layer; 0 for softmax regression.
        log_l2: logarithm of the penalty before the first outer step.
    """

    READS: ClassVar = Reads(blocks=("dynamics",))
    splits = ("validation", "test")
    metric = "accuracy"
    mode = "max"

    def __init__(
        self,
        config: DictConfig,
        settings: ProblemSettings,
        *,
        num_steps: int = 100,
        num_labellers: int = 10,
        scans_each: int = 50,
        num_validation: int = 500,
        most_wrong: float = 0.9,
        hidden: int = 0,
        log_l2: float = -4.0,
    ) -> None:
        super().__init__(config, settings)
        self._scans = load_scans(
            num_labellers=num_labellers,
            scans_each=scans_each,
            num_validation=num_validation,
            most_wrong=most_wrong,
            seed=settings.seed,
            device=settings.device,
            dtype=settings.dtype,
        )
        self._training: dict[str, Any] = {
            "dynamics": build(config, "dynamics"),
            "num_steps": num_steps,
            "hidden": hidden,
            "log_l2": log_l2,
        }

    def training(self) -> ht.ProblemSource:
        """Returns the problem of training on the labelled scans, judged on the validation scans."""
        return self._problem("validation")

    def validation(self) -> ht.ProblemSource:
        """Returns the same: the validation scans are what the trust is learnt by."""
        return self._problem("validation")

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the problem of training again, judged on a split.

        Raises:
            ExpectedFailure: if other problems are asked for: there are none.
        """
        refuse_other_problems(seed)
        return self._problem(split)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns training without learnt trust, with the true labels, and on the validation scans alone."""
        problem = self._problem(split)
        equal = problem.init_hparams()
        inputs, _, labeller = self._scans.training
        known = self._problem(split, training=(inputs, self._scans.true_labels, labeller))
        found = {"equal trust": Baseline(source=problem, hparams=equal)}
        if split == "test":
            clean, labels = self._scans.judged["validation"]
            alone = self._problem(split, training=(clean, labels, torch.zeros_like(labels)))
            found["validation scans alone"] = Baseline(source=alone, hparams=equal)
        return {**found, "true labels": Baseline(source=known, hparams=equal)}

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the learnt trust against the share of wrong labels, and scans of the least trusted labellers."""
        draw_trust(self._scans, hparams["trust"].sigmoid().detach(), folder / "trust.png")

    def _problem(self, split: str, training: tuple[Tensor, Tensor, Tensor] | None = None) -> ht.BilevelProblem:
        return self._scans.problem(split=split, training=training, **self._training)


def noisy_digits(
    *,
    dynamics: ht.Dynamics,
    num_steps: int,
    num_labellers: int = 20,
    scans_each: int = 25,
    num_validation: int = 500,
    most_wrong: float = 0.9,
    hidden: int = 0,
    log_l2: float = -4.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> ht.BilevelProblem:
    """Returns the problem of weighting labellers, some of whom guess, so that a classifier does well on clean scans.

    Labeller `k` of `n` replaces a label by a random one with probability `most_wrong * k / (n - 1)`. The inner problem
    trains a classifier on all labelled scans, each weighted by `sigmoid(trust[k])` of its labeller, with an L2 penalty
    of `exp(log_l2)`. The outer problem judges it on scans with true labels. The data are real: 1797 scans of 8 x 8
    pixels.

    Args:
        dynamics: the inner optimiser.
        num_steps: the horizon (unit: steps).
        num_labellers: how many there are.
        scans_each: scans that each has labelled.
        num_validation: scans with true labels, by which the net is judged.
        most_wrong: share of random labels of the worst labeller.
        hidden: width of the classifier's hidden layer; 0 for softmax regression, whose inner problem is strongly
            convex.
        log_l2: logarithm of the penalty before the first outer step.
        seed: of the choice of scans, of the wrong labels and of the first weights.
        device: where the tensors are.
        dtype: of the tensors.

    Raises:
        ValueError: if there are not as many scans.

    References:
        Franceschi, Donini, Frasconi and Pontil (2017), Forward and reverse gradient-based hyperparameter optimization,
        section 5.1 (there with a weight for each example of MNIST).
    """
    scans = load_scans(
        num_labellers=num_labellers,
        scans_each=scans_each,
        num_validation=num_validation,
        most_wrong=most_wrong,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    return scans.problem(dynamics=dynamics, num_steps=num_steps, hidden=hidden, log_l2=log_l2)


@dataclass(frozen=True, kw_only=True)
class Scans:
    """Scans with labels by labellers, and scans with true labels for validation and test.

    Args:
        training: inputs of shape `(scans, pixels)`, the labels that the labellers gave, and who labelled each.
        true_labels: of the training scans.
        num_labellers: how many there are.
        judged: inputs and true labels by split.
        generator: of the first weights, as the choice of scans left it.
        seed: of all of it.
    """

    training: tuple[Tensor, Tensor, Tensor]
    true_labels: Tensor
    num_labellers: int
    judged: Mapping[str, tuple[Tensor, Tensor]]
    generator: torch.Generator
    seed: int

    def problem(
        self,
        *,
        dynamics: ht.Dynamics,
        num_steps: int,
        hidden: int,
        log_l2: float,
        split: str = "validation",
        training: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> ht.BilevelProblem:
        """Returns the problem of training on the labelled scans, judged on a split.

        Args:
            dynamics: the inner optimiser.
            num_steps: the horizon (unit: steps).
            hidden: width of the hidden layer; 0 for none.
            log_l2: logarithm of the penalty before the first outer step.
            split: what it is judged on.
            training: other inputs, labels and labellers to train on; None for these.
        """
        like = self.training[0]
        # A copy: every problem of these scans starts from the same weights.
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return ht.BilevelProblem(
            LabelledScans(
                data=self.training if training is None else training,
                first={name: value.to(like) for name, value in first_params(_PIXELS, hidden, generator).items()},
            ),
            CleanImages(
                data=self.judged[split],
                first={"trust": like.new_zeros(self.num_labellers), "log_l2": like.new_tensor(log_l2)},
            ),
            dynamics=dynamics,
            num_steps=num_steps,
            seed=self.seed,
        )


def load_scans(
    *,
    num_labellers: int,
    scans_each: int,
    num_validation: int,
    most_wrong: float,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Scans:
    """Returns scikit-learn's scans, shuffled, with wrong labels; what training and validation leave over is the test.

    Raises:
        ValueError: if there are not as many scans.
    """
    num_training = num_labellers * scans_each
    pixels, digits = load_digits(return_X_y=True)
    if num_training + num_validation > len(digits):
        raise ValueError(
            f"`num_labellers * scans_each + num_validation` is {num_training + num_validation}, but there are "
            f"{len(digits)} scans. Lower one of them."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    inputs = torch.as_tensor(pixels / _DARKEST).to(dtype)[order].to(device)
    labels = torch.as_tensor(digits).long()[order]
    labeller = torch.arange(num_training) // scans_each
    wrong_share = most_wrong * labeller / max(num_labellers - 1, 1)
    is_wrong = torch.rand(num_training, generator=generator) < wrong_share
    guesses = torch.randint(CLASSES, (num_training,), generator=generator)
    given = torch.where(is_wrong, guesses, labels[:num_training])
    ends = (num_training, num_training + num_validation, len(digits))
    return Scans(
        training=(inputs[:num_training], given.to(device), labeller.to(device)),
        true_labels=labels[:num_training].to(device),
        num_labellers=num_labellers,
        judged={
            split: (inputs[start:end], labels[start:end].to(device))
            for split, (start, end) in zip(("validation", "test"), pairwise(ends), strict=True)
        },
        generator=generator,
        seed=seed,
    )


def draw_trust(scans: Scans, trust: Tensor, path: Path) -> None:
    """Draws each labeller's weight against the share of labels that are wrong, and the scans that are trusted least.

    Args:
        scans: the training scans.
        trust: weight of each labeller's scans, shape `(labellers,)`.
        path: the picture.
    """
    inputs, given, labeller = (part.cpu() for part in scans.training)
    trust, true = trust.cpu(), scans.true_labels.cpu()
    counts = torch.bincount(labeller, minlength=len(trust))
    wrong = torch.bincount(labeller[given != true], minlength=len(trust)) / counts
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    axes = left.subplots()
    axes.scatter(100 * wrong.numpy(), trust.numpy(), color="tab:blue")
    axes.set(xlabel="wrong labels of a labeller (%)", ylabel="learnt weight", ylim=(-0.05, 1.05))
    axes.grid(alpha=0.3)
    right.suptitle("scans trusted least: the label given, and the true one where it is another", fontsize=9)
    least = trust[labeller].argsort(stable=True)[: _ROWS * _COLUMNS]
    draw_image_grid(right, (_ROWS, _COLUMNS), inputs[least], given[least], true[least])
    figure.savefig(path, dpi=120)


class LabelledScans(WeightedImages):
    """Trains the classifier on what the labellers say, each as far as trusted."""

    def weights(self, hparams: TensorDict, losses: Tensor, source: Tensor) -> Tensor:
        """Returns the trust in each scan's labeller."""
        return hparams["trust"].sigmoid()[source]

    def l2(self, hparams: TensorDict) -> Tensor:
        """Returns the strength of the penalty, from its logarithm."""
        return hparams["log_l2"].exp()

    def full_batch(self) -> Batch:
        """Returns all labelled scans."""
        return self.batch(0)
