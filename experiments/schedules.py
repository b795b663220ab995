"""How to train a net in a given number of steps: a learning rate and a momentum for every step and tensor.

scripts/train experiment=schedules
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.readers import positive_number
from experiments.common.data_sets.digits import CLASSES
from experiments.common.models.labelled_images import CleanImages
from experiments.common.models.mlp import MLP, error_rate
from experiments.common.results.learning_curve import logged
from experiments.common.results.line_styles import COLOURS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline
from experiments.common.runs.seeds import Purpose
from experiments.common.search.random_search import Draw, RandomSearch, random_search
from hypertorch.types import Batch, TensorDict

_SCHEDULES = ("log_lr", "logit_momentum")
# What the random search draws constants from.
_RANGES = {"log_lr": (-3.0, 2.0), "logit_momentum": (-2.0, 4.0), "log_scale": (-4.0, -1.0), "log_l2": (-14.0, -6.0)}


@dataclass(eq=False, repr=False, kw_only=True)
class Schedules(DigitsExperiment):
    """Learns how to train a net, so that its training loss is least after a given number of steps.

    Learning rate and momentum have a value for every inner step and every tensor of the net; the first weights have a
    scale, and the L2 penalty a strength, for every tensor. Each outer step trains from new first weights on new
    minibatches, and the outer loss is the cross-entropy on all training images. The outcome is judged with fresh seeds.

    Args:
        config: the configuration; `dynamics.lr` and `dynamics.momentum` are the values of all tensors before the first
            outer step, each a number for all steps or a schedule.
        sizes: images for "train", "validation" and "test"; 0 for all that are left over.
        hidden: widths of the hidden layers.
        batch_size: images in a minibatch.
        num_steps: the horizon (unit: inner steps).
        log_scale: logarithm of the standard deviation of the first weights and biases, before the first outer step.
        log_l2: logarithm of the strength of the penalty, likewise.
        search_seeds: runs that each draw of the random search is judged on; None for no search.
    """

    splits = ("train", "validation", "test")
    metric = "outer_loss"
    mode = "min"
    published: ClassVar = {
        "Maclaurin et al. 2015 (the authors' logs of a sibling run, one seed)": "training loss 0.177 and test error "
        "8.9 % at constants from Bayesian optimisation; at the best of 50 outer steps 0.110 and 7.0 %, at the last "
        "0.127 to 0.156 and 7.7 to 8.5 %",
    }

    hidden: list[int]
    batch_size: int = 200
    num_steps: int = 100
    log_scale: float = -3.0
    log_l2: float = -11.5
    search_seeds: int | None = 3

    def __post_init__(self) -> None:
        self.images = self.digit_splits()
        like = self.images["train"].inputs
        self._net = MLP((like.shape[1], *self.hidden, CLASSES))
        # Built as it is set, for the checks of its numbers.
        given = build(self.config, "dynamics")
        self._dynamics = replace(
            given,
            lr=ht.Hyper("log_lr", torch.exp, per="step,parameter"),
            momentum=ht.Hyper("logit_momentum", torch.sigmoid, per="step,parameter"),
        )
        starts = {
            "log_lr": first_values(self.config, "dynamics.lr", given.lr, self.num_steps, example=0.37).log(),
            "logit_momentum": first_values(
                self.config, "dynamics.momentum", given.momentum, self.num_steps, below=1.0, example=0.5
            ).logit(),
        }
        self._first = {
            f"{kind}.{name}": start.to(like, copy=True) for kind, start in starts.items() for name in self._net.shapes()
        } | self.constants({"log_scale": self.log_scale, "log_l2": self.log_l2})
        self._search: RandomSearch | None = None

    def training(self) -> ht.ProblemSource:
        """Returns a run from new first weights for every outer step, judged on the training images."""
        return self._runs("training", "train")

    def validation(self) -> ht.ProblemSource:
        """Returns runs with other seeds, judged on the training images: the training loss is what is to be least."""
        return self._runs("validation", "train")

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns runs with fresh seeds, judged on the images of a split."""
        return self._runs("evaluation", split, seed=seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns the first constants, and the best constants that a random search finds in the same CPU time."""
        source = self.evaluation(split)
        found = {"first constants": Baseline(source=source, hparams=self._first)}
        search = self._random_search()
        if search is not None:
            found["best random constants"] = Baseline(source=source, hparams=self.constants(search.best))
        return found

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the schedules of each layer, the hypergradient's norm, and the random search."""
        metrics = folder / "metrics.jsonl"
        draw_schedules(self._first, hparams, self._net, metrics, folder / "schedules.png")
        search = self._random_search()
        if search is not None:
            search.plot(
                folder / "random_search.png",
                label=f"training loss, mean of {self.search_seeds} seeds",
                reached=min(logged(metrics, f"validation/{self.metric}")[1]),
                reached_by="learnt schedules, at the best validation",
            )

    def constants(self, values: Draw) -> TensorDict:
        """Returns outer variables that are the same for all steps and tensors.

        Args:
            values: by kind: `log_lr`, `logit_momentum`, `log_scale` and `log_l2`.
        """
        like = self.images["train"].inputs
        return {
            f"{kind}.{name}": like.new_full((self.num_steps,) if kind in _SCHEDULES else (), value)
            for kind, value in values.items()
            for name in self._net.shapes()
        }

    def _random_search(self) -> RandomSearch | None:
        """Returns the search of constants, made once; None without a setting, or if the CPU time is not known."""
        seeds, seconds = self.search_seeds, self.training_cpu_seconds
        if self._search is None and seeds is not None and seconds is not None:
            source = self._runs("search", "train")

            def loss(draw: Draw) -> float:
                return ht.evaluate(source, self.constants(draw), num_episodes=seeds).metrics[self.metric].mean

            self._search = random_search(_RANGES, loss, cpu_seconds=seconds, seed=self.settings.seed)
        return self._search

    def _runs(self, purpose: Purpose, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns runs with first weights and minibatches of their own, judged on a split."""
        train = TensorDataset(*self.images["train"].pairs())
        outer = CleanImages(
            data=self.images[split].pairs(), first=self._first, net=self._net, measures={"error": error_rate}
        )

        def problem(own: int) -> ht.BilevelProblem:
            inner = ScaledTraining(net=self._net, batches=ht.Minibatches(train, self.batch_size, seed=own))
            return ht.BilevelProblem(inner, outer, dynamics=self._dynamics, num_steps=self.num_steps, seed=own)

        return self.reseeded(purpose, problem, seed=seed)


def first_values(
    config: DictConfig,
    key: str,
    given: ht.dynamics.Setting,
    num_steps: int,
    *,
    below: float = math.inf,
    example: float,
) -> Tensor:
    """Returns the values of a setting at every step before the first outer step, shape `(steps,)`, float64.

    Args:
        config: the configuration.
        key: dotted name of the setting.
        given: what it was built to: a number, or a schedule.
        num_steps: the horizon (unit: steps).
        below: what all values must be below, beside above 0.
        example: a number that would do, for the message.

    Raises:
        ExpectedFailure: if a value is out of range, or the schedule has another length.
    """
    purpose = "its logarithm is learnt" if below == math.inf else "its logit is learnt"
    if not isinstance(given, Sequence):
        given = [positive_number(config, key, purpose=purpose, example=example)] * num_steps
    if len(given) != num_steps or not (min(given) > 0.0 and max(given) < below):
        raise ExpectedFailure(
            f"`{key}` has {len(given)} values between {min(given):g} and {max(given):g}, but {purpose} at each of "
            f"{num_steps} steps, so as many values above 0{'' if below == math.inf else f' and below {below:g}'} are "
            f"needed. Write for example {key}={example:g}."
        )
    return torch.tensor(given, dtype=torch.float64)


class ScaledTraining(ht.InnerProblem):
    """Trains a net whose first weights have learnt scales, with learnt penalties.

    Args:
        net: the net.
        batches: images and labels of an inner step.
    """

    def __init__(self, *, net: MLP, batches: ht.Minibatches) -> None:
        self._net = net
        self._batches = batches

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns standard normal numbers times the scales, weights and biases alike."""
        scales = {name: hparams[f"log_scale.{name}"].exp() for name in self._net.shapes()}
        return self._net.draw(next(iter(scales.values())), scales)

    def batch(self, step: int) -> Batch:
        """Returns images and labels."""
        return self._batches(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy and half of the sum of the strengths times the squared norms."""
        images, labels = batch
        penalties = [hparams[f"log_l2.{name}"].exp() * value.square().sum() for name, value in params.items()]
        return F.cross_entropy(self._net(params, images), labels) + torch.stack(penalties).sum() / 2


def draw_schedules(before: TensorDict, after: TensorDict, net: MLP, metrics: Path, path: Path) -> None:
    """Draws rates and momenta over the inner steps, and the hypergradient's norm and the loss over the outer steps.

    Args:
        before: the outer variables before the first outer step.
        after: those that were learnt.
        net: the net.
        metrics: the run's metrics.jsonl.
        path: the picture.
    """
    figure = Figure(figsize=(10, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.9, 1), squeeze=False)[:, 0]
    grid = above.subplots(2, 2, sharex=True, sharey="row", squeeze=False)
    values = (torch.exp, torch.sigmoid)
    for line, kind, value, label in zip(grid, _SCHEDULES, values, ("learning rate", "momentum"), strict=True):
        for axes, part in zip(line, ("weight", "bias"), strict=True):
            for layer, colour in zip(net.layers, COLOURS, strict=False):
                axes.plot(value(after[f"{kind}.{layer}.{part}"]).detach().cpu().numpy(), color=colour, label=layer)
            first = value(before[f"{kind}.{net.layers[0]}.{part}"]).cpu().numpy()
            axes.plot(first, color="black", linestyle="--", linewidth=1, label="all, at first")
            axes.set_title(f"{label}, {'weights' if part == 'weight' else 'biases'}", fontsize=10)
            axes.grid(alpha=0.25)
        line[0].set_ylabel(label)
    grid[0, 0].set_yscale("log")
    for axes in grid[1]:
        axes.set_xlabel("inner step")
    above.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    left, right = below.subplots(1, 2)
    left.plot(*logged(metrics, "hypergradient_norm"), color=COLOURS[0], linewidth=1)
    left.set(xlabel="outer step", ylabel="norm of the hypergradient", yscale="log")
    right.plot(*logged(metrics, "outer_loss"), color=COLOURS[0], linewidth=1, alpha=0.6, label="training, new seeds")
    right.plot(*logged(metrics, "validation/outer_loss"), color=COLOURS[1], marker=".", label="validation, same seeds")
    right.set(xlabel="outer step", ylabel="final training loss", yscale="log")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=90)
