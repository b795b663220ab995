"""An L2 penalty and an input noise for each layer, learnt while nets are trained once: T1-T2, from random starts.

scripts/train experiment=regularisation
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.outer_updates import build_outer_optimizer
from experiments.common.configuration.settings import TrainSettings
from experiments.common.data_sets.digits import CLASSES
from experiments.common.models.mlp import MLP
from experiments.common.models.trained_net import TrainedNet
from experiments.common.results.learning_curve import logged
from experiments.common.results.line_styles import COLOURS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline, refuse_other_length
from experiments.common.runs.seeds import Purpose, run_seed
from hypertorch.types import Batch, TensorDict, TensorMapping

_KINDS = {"l2": "strength of the L2 penalty", "noise": "standard deviation of the noise"}
_STARTS, _RUN = "values of the starts", "nets of the run itself"
_MEASURED = 20  # outer steps that their CPU time is measured by


@dataclass(eq=False, repr=False, kw_only=True)
class Regularisation(DigitsExperiment):
    """Learns the regularisation of each layer by T1-T2 while nets are trained, then trains anew with the final values.

    Each start has a net, and random first values, of its own. The nets are trained once: an outer step takes `every`
    inner steps and moves the values along the hypergradient through the last of them (backend `OneStep`). The outcome
    is judged by reruns: new first weights, as many inner steps, the final values held fixed.

    Args:
        sizes: images for "train", "validation" and "test"; 0 for all that are left over.
        l2: least and greatest L2 penalty of a start.
        noise: least and greatest standard deviation of a start's noise (unit: of a pixel, or of an activation).
        num_starts: how many, each drawn log-uniformly from `l2` and `noise`, for each layer.
        hidden: widths of the hidden layers.
        batch_size: images in a minibatch of an inner step.
        outer_batch_size: validation images in an outer step.
        every: inner steps between two outer steps.
        num_updates: outer steps of the run; a rerun takes as many inner steps as all of them.
    """

    splits = ("validation", "test")
    metric = "error"
    mode = "min"
    published: ClassVar = {
        "T1-T2 (MNIST, 55,000 training images; Luketina et al. 2016)": "scatter plots, no table: none of the learnt "
        "regularisations is poor, whatever the start; about 30 % more time than plain training",
    }

    l2: list[float]
    noise: list[float]
    num_starts: int = 6
    hidden: list[int]
    batch_size: int = 50
    outer_batch_size: int = 200
    every: int = 10
    num_updates: int

    def __post_init__(self) -> None:
        self.images = self.digit_splits()
        like = self.images["train"].inputs
        self.nets = StackedMLP(self.num_starts, MLP((like.shape[1], *self.hidden, CLASSES)))
        starts = random_starts(
            {"l2": self.l2, "noise": self.noise}, self.num_starts, self.nets.layers, seed=self.settings.seed
        )
        self.first = {name: value.to(like) for name, value in starts.items()}
        self._dynamics: ht.Dynamics = build(self.config, "dynamics")
        # After a run: the nets of the reruns, and those that the run left, by name.
        self._trained: dict[str, TensorDict] = {}

    def training(self) -> ht.ProblemSource:
        """Returns the run that goes on from outer step to outer step, judged on new validation images at each."""
        held_out = TensorDataset(*self.images["validation"].pairs())
        batches = ht.Minibatches(held_out, self.outer_batch_size, seed=self.settings.seed)
        return replace(self._run("training", batches, with_values=True), num_steps=self.every, warm_start=True)

    def validation(self) -> ht.ProblemSource:
        """Returns reruns, judged on all validation images."""
        return self._run("validation", lambda _: self.images["validation"].pairs())

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns reruns, judged on all images of a split; after a run, reruns that were made."""
        if seed is None and self._trained:
            return self._judged("learnt", split)
        return self._run("evaluation", lambda _: self.images[split].pairs(), seed=seed)

    def after(self, trained: ht.Trained) -> Regularisation:
        """Returns the experiment that judges reruns, with the learnt values and with the first, and the run's nets."""
        rerun = self.evaluation("validation").at(0)
        found = copy(self)
        found._trained = {
            "learnt": ht.unroll(rerun, trained.best_hparams).params,
            _STARTS: ht.unroll(rerun, self.first).params,
            _RUN: trained.params,
        }
        return found

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns reruns with the values of the starts, and the nets whose training the values were learnt in."""
        names = (_STARTS, _RUN) if self._trained else ()
        return {name: Baseline(source=self._judged(name, split), hparams=self.first) for name in names}

    def check_training(self, settings: TrainSettings) -> None:
        """Refuses a run of another length than `num_updates`."""
        refuse_other_length(settings, self.num_updates)

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the path of every value, and the test errors of reruns with the first and with the learnt values."""
        images = self.images["test"]
        before, after = (
            (100 * errors(self.nets(self._trained[name], images.inputs), images.labels)).tolist()
            for name in (_STARTS, "learnt")
        )
        title = f"An outer step every {self.every} inner steps takes {100 * self.overhead():.0f} % more CPU time"
        draw_starts(folder / "metrics.jsonl", self.nets.layers, before, after, title, folder / "regularisation.png")

    def overhead(self) -> float:
        """Returns what outer steps add to the CPU time of training, as a share of that, measured on a few of them."""
        source = self.training().at(0)
        loop = ht.OuterLoop(
            source, optimizer=build_outer_optimizer(self.config), backend=build(self.config, "hypergradient")
        )
        plain = replace(source, num_steps=_MEASURED * self.every, warm_start=False)
        spent = [0.0, 0.0]
        for _ in range(3):
            start = process_time()
            loop.run(_MEASURED)
            between = process_time()
            ht.unroll(plain, self.first)
            spent = [spent[0] + between - start, spent[1] + process_time() - between]
        return spent[0] / spent[1] - 1.0

    def _judged(self, name: str, split: str) -> ht.BilevelProblem:
        problem = self._run("evaluation", lambda _: self.images[split].pairs())
        return replace(problem, inner=TrainedNet(self._trained[name]), num_steps=0)

    def _run(
        self, purpose: Purpose, judged: Callable[[int], Batch], *, with_values: bool = False, seed: int | None = None
    ) -> ht.BilevelProblem:
        """Returns a whole run of the nets, with first weights and minibatches of its own."""
        own = run_seed(self.settings.seed if seed is None else seed, purpose, 0)
        train = TensorDataset(*self.images["train"].pairs())
        return ht.BilevelProblem(
            RegularisedTraining(self.nets, ht.Minibatches(train, self.batch_size, seed=own)),
            HeldOutImages(self.nets, judged, first=self.first, with_values=with_values),
            dynamics=self._dynamics,
            num_steps=self.every * self.num_updates,
            seed=own,
        )


def random_starts(ranges: Mapping[str, list[float]], num_starts: int, layers: list[str], *, seed: int) -> TensorDict:
    """Returns logarithms that are drawn uniformly, `log_{kind}.{layer}` of shape `(starts,)`.

    Args:
        ranges: least and greatest value by kind, above 0.
        num_starts: how many.
        layers: names of the layers.
        seed: of the draw.

    Raises:
        ExpectedFailure: if a range holds no positive numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: TensorDict = {}
    for kind, (low, high) in ranges.items():
        if not 0.0 < low <= high:
            raise ExpectedFailure(
                f"`experiment.{kind}` is [{low}, {high}], but the values of the starts are drawn log-uniformly between "
                "them: both must be above 0, the least first. Write two such numbers."
            )
        for layer in layers:
            places = torch.rand(num_starts, generator=generator, dtype=torch.float64)
            drawn[f"log_{kind}.{layer}"] = math.log(low) + (math.log(high) - math.log(low)) * places
    return drawn


@dataclass(frozen=True)
class StackedMLP:
    """Nets of the same shape, one for each start, as one function of their weights.

    Args:
        num_starts: how many.
        net: one of them.
    """

    num_starts: int
    net: MLP

    @property
    def layers(self) -> list[str]:
        """Names of the layers, first to last."""
        return self.net.layers

    @property
    def names(self) -> list[str]:
        """Names of the weights."""
        return list(self.net.shapes())

    def draw(self, like: Tensor) -> TensorDict:
        """Returns the same first weights for every net, each of shape `(starts, ...)`."""
        drawn = self.net.draw(like)
        return {name: value.expand(self.num_starts, *value.shape).clone() for name, value in drawn.items()}

    def __call__(self, params: TensorMapping, inputs: Tensor, noise: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the outputs, shape `(starts, batch, classes)`.

        Args:
            params: the weights of all nets.
            inputs: shape `(batch, pixels)`, the same for all nets.
            noise: standard deviation of the noise on the inputs of each layer, shape `(starts,)`; None for no noise.
        """
        values = inputs.expand(self.num_starts, *inputs.shape)
        for layer in self.layers:
            values = values if layer == self.layers[0] else self.net.activation(values)
            if noise is not None:
                # The same normal numbers for all nets, times a deviation of each net's own.
                drawn = torch.randn(values.shape[1:], dtype=values.dtype, device=values.device)
                values = values + noise[layer][:, None, None] * drawn
            values = torch.baddbmm(params[f"{layer}.bias"][:, None], values, params[f"{layer}.weight"].mT)
        return values


class RegularisedTraining(ht.InnerProblem):
    """Trains the nets with noise on the inputs of every layer, and an L2 penalty on its weights.

    Args:
        nets: one for each start.
        batches: images and labels of an inner step, the same for all.
    """

    def __init__(self, nets: StackedMLP, batches: ht.Minibatches) -> None:
        self._nets = nets
        self._batches = batches

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights."""
        return self._nets.draw(next(iter(hparams.values())))

    def batch(self, step: int) -> Batch:
        """Returns images and labels."""
        return self._batches(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the sum over nets of the cross-entropy with noise and `sum_layers exp(log_l2) |W|^2 / 2`."""
        inputs, labels = batch
        noise = {layer: hparams[f"log_noise.{layer}"].exp() for layer in self._nets.layers}
        loss = losses(self._nets(params, inputs, noise), labels).sum()
        for layer in self._nets.layers:
            loss = loss + hparams[f"log_l2.{layer}"].exp() @ params[f"{layer}.weight"].square().sum(dim=(1, 2)) / 2
        return loss


class HeldOutImages(ht.OuterProblem):
    """Judges the nets without noise and without a penalty.

    Args:
        nets: one for each start.
        batches: images and labels of an outer step.
        first: the values of all starts before the first outer step.
        with_values: whether to report the values beside the errors.
    """

    def __init__(
        self, nets: StackedMLP, batches: Callable[[int], Batch], *, first: TensorDict, with_values: bool
    ) -> None:
        self._nets = nets
        self._batches = batches
        self._first = first
        self._with_values = with_values

    def init_hparams(self) -> TensorDict:
        """Returns the logarithms of penalties and noises by layer, of shape `(starts,)`."""
        return dict(self._first)

    def batch(self, outer_step: int) -> Batch:
        """Returns images and labels."""
        return self._batches(outer_step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the sum of the cross-entropies: each net's values are moved by its own alone."""
        inputs, labels = batch
        return losses(self._nets(params, inputs), labels).sum()

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the mean, least and greatest share of wrong answers over the starts."""
        found = errors(self._nets(params, batch[0]), batch[1])
        figures = {"error": found.mean(), "least_error": found.min(), "greatest_error": found.max()}
        if self._with_values:
            for name, value in hparams.items():
                figures |= {f"{name}.{start}": own for start, own in enumerate(value)}
        return figures


def losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of each net, shape `(starts,)`."""
    own = F.cross_entropy(outputs.flatten(0, 1), labels.repeat(len(outputs)), reduction="none")
    return own.reshape(outputs.shape[:2]).mean(dim=1)


def errors(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of wrong answers of each net, shape `(starts,)`."""
    return (outputs.argmax(dim=-1) != labels).to(outputs.dtype).mean(dim=1)


def draw_starts(
    metrics: Path, layers: list[str], before: list[float], after: list[float], title: str, path: Path
) -> None:
    """Draws the path of every value while the nets are trained, and the errors of reruns before and after.

    Args:
        metrics: the run's metrics.jsonl.
        layers: names of the layers.
        before: error with the values of each start (unit: percent).
        after: error with the learnt values.
        title: of the picture.
        path: the picture.
    """
    figure = Figure(figsize=(3.2 * (len(layers) + 1.3), 6.0), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subfigures(1, 2, width_ratios=(len(layers), 1.3), squeeze=False)[0]
    grid = left.subplots(len(_KINDS), len(layers), sharex=True, sharey="row", squeeze=False)
    colours = [COLOURS[start % len(COLOURS)] for start in range(len(before))]
    for row, (kind, label) in zip(grid, _KINDS.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, layer in zip(row, layers, strict=True):
            for start, colour in enumerate(colours):
                steps, values = logged(metrics, f"log_{kind}.{layer}.{start}")
                axes.plot(steps, [math.exp(value) for value in values], color=colour)
            axes.set_yscale("log")
            axes.grid(alpha=0.25)
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(layer)
    for axes in grid[-1]:
        axes.set_xlabel("outer step")
    left.suptitle("Learnt while the nets are trained once")
    right.suptitle("Training anew, values held fixed")
    axes = right.subplots()
    for start, (colour, *ends) in enumerate(zip(colours, before, after, strict=True)):
        axes.plot([0, 1], ends, color=colour, marker="o", linewidth=2, label=f"start {start + 1}")
    axes.set(xlim=(-0.3, 1.3), ylim=(0, None), ylabel="test error (%)")
    axes.set_xticks([0, 1], ["values of\nthe start", "learnt\nvalues"])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=80)
