"""How much each of many trained nets should say: the weights of an ensemble, learnt on validation images.

scripts/train experiment=ensemble
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.data_sets.digits import CLASSES, Images
from experiments.common.models.mlp import MLP
from experiments.common.models.net_training import NetTraining
from experiments.common.results.line_styles import COLOURS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline, refuse_other_problems
from experiments.common.runs.seeds import run_seed
from hypertorch.types import Batch, TensorDict

_WIDTHS = (2, 4, 8, 16, 32)
_FEWEST = 0.05  # share of the training images that the least trained net sees


@dataclass(eq=False, repr=False, kw_only=True)
class Ensemble(DigitsExperiment):
    """Learns the weights of nets that differ in width, training images and seed; a net's answer is a distribution.

    The weights lie on the simplex, so that most become zero. They are learnt on several resamples of the validation
    images at once, each with weights of its own. The loss is the cross-entropy of the weighted mean of the answers,
    minus a reward for diversity: how far the nets are from their mean. A net's frequency is the share of resamples in
    which it has a weight. The ensemble takes the nets that are frequent enough, with the mean of their weights.

    Args:
        config: the configuration, for the group `dynamics`, which trains the nets.
        sizes: images for "train", "validation" and "test"; 0 for all that are left over.
        num_nets: how many nets there are to choose from.
        train_steps: of each net (unit: inner steps).
        batch_size: images in a minibatch.
        num_resamples: resamples of the validation images.
        diversity: factor of the reward, at least 0.
        least_frequency: share of the resamples in which a net has a weight, from which on it is taken.
        num_picks: nets that the greedy selections take one after the other, the same ones again if they help.
    """

    splits = ("validation", "test")
    metric = "outer_loss"
    mode = "min"

    num_nets: int = 30
    train_steps: int = 100
    batch_size: int = 20
    num_resamples: int = 8
    diversity: float = 0.2
    least_frequency: float = 0.5
    num_picks: int = 20

    def __post_init__(self) -> None:
        counts = {"num_nets": self.num_nets, "num_resamples": self.num_resamples, "num_picks": self.num_picks}
        for name, count in counts.items():
            if count < 1:
                raise ExpectedFailure(f"`experiment.{name}` is {count}, but it is a count. Write 1 or more.")
        if not self.diversity >= 0.0:
            raise ExpectedFailure(f"`experiment.diversity` is {self.diversity}, but it is a reward. Write 0 or more.")
        if not 0.0 <= self.least_frequency <= 1.0:
            raise ExpectedFailure(
                f"`experiment.least_frequency` is {self.least_frequency}, but it is a share. Write a number "
                "from 0 to 1."
            )
        self._images = self.digit_splits()
        self._dynamics: ht.Dynamics = build(self.config, "dynamics")

    @cached_property
    def answers(self) -> dict[str, Tensor]:
        """The probabilities that each net gives, by split, shape `(nets, images, classes)`; trained once."""
        found: dict[str, list[Tensor]] = {split: [] for split in self.splits}
        generator = torch.Generator().manual_seed(self.settings.seed)
        train = self._images["train"]
        for net in range(self.num_nets):
            # From few images to all: most nets know something that others do not.
            share = _FEWEST ** float(torch.rand((), generator=generator))
            chosen = torch.randperm(len(train), generator=generator)[: max(self.batch_size, round(share * len(train)))]
            width = _WIDTHS[int(torch.randint(len(_WIDTHS), (), generator=generator))]
            mlp = MLP((train.inputs.shape[1], width, CLASSES))
            params = self._trained(
                mlp, train[chosen.to(train.labels.device)], run_seed(self.settings.seed, "search", net)
            )
            for split, own in found.items():
                own.append(mlp(params, self._images[split].inputs).softmax(dim=1))
        return {split: torch.stack(own) for split, own in found.items()}

    def training(self) -> ht.ProblemSource:
        """Returns the judgement of the weights of every resample on its own validation images."""
        return self._problem(Resampled(self.answers["validation"], *self._resamples, diversity=self.diversity))

    def validation(self) -> ht.ProblemSource:
        """Returns the judgement of the ensemble on all validation images."""
        return self.evaluation("validation")

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the judgement of the ensemble on a split.

        Raises:
            ExpectedFailure: if other problems are asked for: there are none.
        """
        refuse_other_problems(seed)
        return self._problem(
            Judged(self.answers[split], self._images[split].labels, self.num_resamples, self.least_frequency)
        )

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns the best net alone, all alike, greedy selection, and ESDF: greedy with diversity and frequency."""
        source = self.evaluation(split)
        return {
            name: Baseline(source=source, hparams=dict.fromkeys(_names(self.num_resamples), weights))
            for name, weights in self.selected.items()
        }

    @cached_property
    def selected(self) -> dict[str, Tensor]:
        """The weights that the baselines give the nets, by name, each of shape `(nets,)`."""
        answers, labels = self.answers["validation"], self._images["validation"].labels
        alone = torch.stack([cross_entropy(own, labels) for own in answers])
        single = F.one_hot(alone.argmin(), len(answers)).to(answers)
        counts = torch.stack(
            [
                greedy(answers[:, rows], labels[rows], self.num_picks, diversity=self.diversity)
                for rows in self._resamples[1]
            ]
        )
        return {
            "best net alone": single,
            "all alike": torch.full_like(single, 1.0 / len(answers)),
            "greedy": greedy(answers, labels, self.num_picks),
            "greedy, diversity and frequency": frequent(counts, self.least_frequency),
        }

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the weight of every net by each way to choose, and what they reach on the last split, the test."""
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        answers, labels = self.answers["validation"], self._images["validation"].labels
        alone = (answers.argmax(dim=-1) == labels).to(answers.dtype).mean(dim=1)
        learnt = torch.stack([hparams[name] for name in _names(self.num_resamples)])
        weights = {"learnt": frequent(learnt, self.least_frequency), **self.selected}
        draw_ensembles(alone, weights, (learnt > 0).to(learnt.dtype).mean(dim=0), results, folder / "ensemble.png")

    @cached_property
    def _resamples(self) -> tuple[Tensor, Tensor]:
        """All labels, and the validation images of each resample, drawn with repetition, `(resamples, images)`."""
        labels = self._images["validation"].labels
        generator = torch.Generator().manual_seed(run_seed(self.settings.seed, "training", 0))
        rows = torch.randint(len(labels), (self.num_resamples, len(labels)), generator=generator)
        return labels, rows.to(labels.device)

    def _trained(self, mlp: MLP, images: Images, seed: int) -> TensorDict:
        batches = ht.Minibatches(TensorDataset(*images.pairs()), self.batch_size, seed=seed)
        problem = ht.BilevelProblem(
            NetTraining(net=mlp, batches=batches, like=images.inputs),
            Nothing(),
            dynamics=self._dynamics,
            num_steps=self.train_steps,
            seed=seed,
        )
        return ht.unroll(problem, problem.init_hparams()).params

    def _problem(self, outer: ht.OuterProblem) -> ht.BilevelProblem:
        return ht.BilevelProblem(Weights(), outer, dynamics=self._dynamics, num_steps=0)


def _names(num_resamples: int) -> list[str]:
    return [f"weights.{index}" for index in range(num_resamples)]


def cross_entropy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean of `-log p[label]`, over images of shape `(..., images, classes)`: shape `(...)`."""
    index = labels.expand(probabilities.shape[:-1]).unsqueeze(-1)
    right = probabilities.gather(-1, index).squeeze(-1)
    # A probability may be zero in single precision.
    return -right.clamp(min=torch.finfo(right.dtype).tiny).log().mean(dim=-1)


def mixed(answers: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted mean of the answers: `(nets, images, classes)` and `(nets,)` to `(images, classes)`."""
    return torch.einsum("m,mnc->nc", weights, answers)


def ambiguity(answers: Tensor, weights: Tensor) -> Tensor:
    """Returns how far the nets are from their mean: `sum_m w_m |p_m - p|^2`, a mean over images, shape `()`.

    The squared error of the mean is the mean squared error of the nets minus this (Krogh and Vedelsby 1995).
    """
    return weights @ answers.square().sum(dim=2).mean(dim=1) - mixed(answers, weights).square().sum(dim=1).mean()


def greedy(answers: Tensor, labels: Tensor, num_picks: int, *, diversity: float = 0.0) -> Tensor:
    """Returns the weights of nets that are taken one after the other, each time the one that lowers the loss most.

    Args:
        answers: probabilities, shape `(nets, images, classes)`.
        labels: shape `(images,)`.
        num_picks: how many are taken; a net can be taken again, and has as much weight as it is often taken.
        diversity: factor of the ambiguity, which is taken off the loss.

    Returns:
        Weights that sum to 1, shape `(nets,)`.

    References:
        Caruana et al. (2004), Ensemble selection from libraries of models.
    """
    counts = answers.new_zeros(len(answers))
    taken, sizes = torch.zeros_like(answers[0]), answers.square().sum(dim=2).mean(dim=1)
    for pick in range(1, num_picks + 1):
        means = (taken + answers) / pick
        spread = (counts @ sizes + sizes) / pick - means.square().sum(dim=2).mean(dim=1)
        best = int((cross_entropy(means, labels) - diversity * spread).argmin())
        counts[best] += 1.0
        taken = taken + answers[best]
    return counts / num_picks


def frequent(weights: Tensor, least_frequency: float) -> Tensor:
    """Returns one weight for each net: the mean over resamples, of those that have a weight in enough of them.

    Args:
        weights: by resample, shape `(resamples, nets)`.
        least_frequency: share of the resamples; where no net has it, the most frequent are taken.

    Returns:
        Weights that sum to 1, shape `(nets,)`.
    """
    frequency = (weights > 0).to(weights.dtype).mean(dim=0)
    kept = frequency >= min(least_frequency, float(frequency.max()))
    own = weights.mean(dim=0) * kept
    return own / own.sum()


class Weights(ht.InnerProblem):
    """The weights themselves: there is nothing to train."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the weights of all resamples, shape `(resamples, nets)`."""
        return {"weights": torch.stack(list(hparams.values()))}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Refuses: there are no steps."""
        raise AssertionError("weights of an ensemble are not trained by steps")


class Judged(ht.OuterProblem):
    """Judges the ensemble by its cross-entropy.

    Args:
        answers: probabilities that the nets give, shape `(nets, images, classes)`.
        labels: shape `(images,)`.
        num_resamples: how many there are.
        least_frequency: of the nets that are taken.
    """

    def __init__(self, answers: Tensor, labels: Tensor, num_resamples: int, least_frequency: float = 0.0) -> None:
        self._answers = answers
        self._labels = labels
        self._num_resamples = num_resamples
        self._least_frequency = least_frequency

    def init_hparams(self) -> TensorDict:
        """Returns the same weight for every net, `weights.INDEX` of shape `(nets,)` for each resample."""
        alike = self._answers.new_full((len(self._answers),), 1.0 / len(self._answers))
        return {name: alike.clone() for name in _names(self._num_resamples)}

    def constraints(self) -> Mapping[str, ht.Constraint]:
        """Returns the simplex, for the weights of each resample."""
        return {"weights.*": ht.Simplex()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy."""
        return cross_entropy(mixed(self._answers, self._chosen(params)), self._labels)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the accuracy, how many nets have a weight, and their ambiguity."""
        weights = self._chosen(params)
        right = mixed(self._answers, weights).argmax(dim=1) == self._labels
        return {
            "accuracy": right.to(weights.dtype).mean(),
            "nets": (weights > 0).sum().to(weights.dtype),
            "diversity": ambiguity(self._answers, weights),
        }

    def _chosen(self, params: TensorDict) -> Tensor:
        return frequent(params["weights"], self._least_frequency)


class Resampled(Judged):
    """Judges the weights of every resample on its own images, with a reward for diversity.

    Args:
        answers: probabilities that the nets give, shape `(nets, images, classes)`.
        labels: shape `(images,)`.
        rows: images of each resample, shape `(resamples, images)`.
        diversity: factor of the reward.
    """

    def __init__(self, answers: Tensor, labels: Tensor, rows: Tensor, *, diversity: float) -> None:
        super().__init__(answers, labels, len(rows))
        self._rows = rows
        self._diversity = diversity

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the sum over resamples: each moves weights of its own."""
        found = []
        for rows, weights in zip(self._rows, params["weights"], strict=True):
            own = self._answers[:, rows]
            loss = cross_entropy(mixed(own, weights), self._labels[rows])
            found.append(loss - self._diversity * ambiguity(own, weights))
        return torch.stack(found).sum()


class Nothing(ht.OuterProblem):
    """Judges nothing: a net of the library is only trained."""

    def init_hparams(self) -> TensorDict:
        """Returns a variable that nothing reads."""
        return {"unused": torch.zeros(())}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns zero."""
        return torch.zeros(())


def draw_ensembles(
    alone: Tensor, weights: Mapping[str, Tensor], frequency: Tensor, results: Mapping[str, Mapping], path: Path
) -> None:
    """Draws the weights that each way to choose gives the nets, and what the ensembles reach on the last split.

    Args:
        alone: validation accuracy of each net, shape `(nets,)`.
        weights: by the name of the way, each of shape `(nets,)`.
        frequency: share of the resamples in which each net has a learnt weight, shape `(nets,)`.
        results: the contents of the run's results.json.
        path: the picture.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1.0), squeeze=False)[0]
    order = alone.argsort().tolist()
    shown = [name for name in weights if name != "all alike"]
    rows = left.subplots(len(shown) + 1, 1, sharex=True, squeeze=False)[:, 0]
    for axes, name, colour in zip(rows, shown, COLOURS, strict=False):
        axes.bar(range(len(order)), [float(weights[name][net]) for net in order], color=colour)
        axes.set_title(f"weights: {name}", fontsize=10, loc="left")
    rows[-1].bar(range(len(order)), [float(frequency[net]) for net in order], color="0.6")
    rows[-1].set_title("frequency: share of resamples with a learnt weight", fontsize=10, loc="left")
    rows[-1].set_xlabel("nets, from the least accurate alone to the most")
    for axes in rows:
        axes.grid(alpha=0.25, axis="y")
    reached = {"learnt": results["metrics"], **results["baselines"]}
    split = list(results["metrics"])[-1]
    loss, accuracy = right.subplots(2, 1, sharey=True)
    names = list(reversed(reached))
    for axes, figure_name, scale, label in (
        (loss, "outer_loss", 1.0, f"cross-entropy on {split} images"),
        (accuracy, "accuracy", 100.0, f"accuracy on {split} images (%)"),
    ):
        values = [scale * reached[name][split][figure_name]["mean"] for name in names]
        axes.barh([name.replace(", ", ",\n") for name in names], values, color=COLOURS[0])
        for place, value in enumerate(values):
            axes.text(value, place, f" {value:.3g}", va="center", fontsize=9)
        low, high = min(values), max(values)
        axes.set_xlim(low - 0.5 * (high - low) - 1e-9, high + 0.3 * (high - low) + 1e-9)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25, axis="x")
    figure.savefig(path, dpi=80)
