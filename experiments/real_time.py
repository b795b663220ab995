"""Learning rate, momentum and the weight of an auxiliary task, learnt while a net is trained once.

scripts/train experiment=real_time
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from sklearn.manifold import SpectralEmbedding
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.readers import positive_number
from experiments.common.configuration.settings import TrainSettings
from experiments.common.data_sets.digits import CLASSES
from experiments.common.models.mlp import MLP, accuracy
from experiments.common.models.trained_net import TrainedNet
from experiments.common.results.learning_curve import logged
from experiments.common.results.line_styles import COLOURS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline, refuse_other_length, refuse_other_problems
from experiments.common.search.random_search import Draw, RandomSearch, random_search
from hypertorch.errors import NonFiniteError
from hypertorch.types import Batch, TensorDict

# What the random search draws from: decimal logarithms, and the momentum itself.
_RANGES = {"log10_lr": (-3.0, 0.0), "momentum": (0.0, 0.95), "log10_auxiliary": (-3.0, 0.0)}


@dataclass(eq=False, repr=False, kw_only=True)
class RealTime(DigitsExperiment):
    """Learns three hyperparameters within the single run of a net with two heads.

    The primary head names the digit, for a few images that have labels. The auxiliary head places images without
    labels in a map that puts images near each other where their pixels are alike. The inner loss is
    `cross-entropy + auxiliary * squared error`. After every `every` inner steps learning rate, momentum and
    `auxiliary` move along the hypergradient of the cross-entropy on validation images, by forward mode, whose tangents
    are carried on with the net. It is what `ht.RealTime` does. The outcome is the net at the end of the run.

    Args:
        config: the configuration; `dynamics.lr` and `dynamics.momentum` are where the run starts.
        sizes: images for "labelled", "unlabelled", "validation" and "test"; 0 for all that are left over.
        hidden: width of the net's hidden layer.
        batch_size: images with labels in a minibatch of an inner step, and images without.
        map_axes: coordinates of an image in the map.
        auxiliary: weight of the auxiliary loss where the run starts.
        every: inner steps between two updates of the hyperparameters.
        num_updates: of the run.
        search: whether to compare with a random search that takes as much CPU time.
    """

    splits = ("validation", "test")
    metric = "accuracy"
    mode = "max"
    published: ClassVar = {
        "Franceschi et al. 2017 on TIMIT, which is licensed (quoted from memory)": "accuracy 61.97 % in 164 minutes; "
        "not learnt 59.81 % in 12; random search 60.36 % in 300",
    }

    hidden: int = 128
    batch_size: int = 100
    map_axes: int = 15
    auxiliary: float = 0.0
    every: int = 20
    num_updates: int
    search: bool = True

    def __post_init__(self) -> None:
        self.images = self.digit_splits()
        unlabelled = self.images["unlabelled"].inputs
        self._net = MLP((unlabelled.shape[1], self.hidden, CLASSES + self.map_axes))
        self._inner = TwoHeads(
            self._net,
            ht.Minibatches(TensorDataset(*self.images["labelled"].pairs()), self.batch_size, seed=self.settings.seed),
            ht.Minibatches(
                TensorDataset(unlabelled, neighbour_map(unlabelled, self.map_axes)),
                self.batch_size,
                seed=self.settings.seed,
            ),
        )
        # Built as it is set, for the checks of its numbers.
        self._dynamics = replace(build(self.config, "dynamics"), lr=ht.Hyper("lr"), momentum=ht.Hyper("momentum"))
        purpose = "it is where the learnt one starts"
        lr = positive_number(self.config, "dynamics.lr", purpose=purpose, example=0.01)
        momentum = positive_number(self.config, "dynamics.momentum", purpose=purpose, example=0.5, or_zero=True)
        self._first = self._hparams(lr, momentum, self.auxiliary)
        self._end: TensorDict = {}
        self._search: RandomSearch | None = None

    def training(self) -> ht.ProblemSource:
        """Returns the run that goes on from update to update, judged on the validation images."""
        return replace(self._run("validation"), num_steps=self.every, warm_start=True)

    def validation(self) -> ht.ProblemSource:
        """Returns the whole run from its start, with hyperparameters that stay as they are."""
        return self._run("validation")

    def after(self, trained: ht.Trained) -> RealTime:
        """Returns the experiment that judges the net at the end of the run."""
        found = copy(self)
        found._end = trained.params
        return found

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the net at the end of the run, which takes no more steps.

        Raises:
            ExpectedFailure: if other problems are asked for, of which there are none, or there was no run.
        """
        refuse_other_problems(seed)
        if not self._end:
            raise ExpectedFailure(
                "`experiment` is RealTime, whose outcome is the net of its single run: it cannot be made of the outer "
                "variables alone. Look into the run's results.json, or train again."
            )
        return replace(self._run(split), inner=TrainedNet(self._end), num_steps=0)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns the whole run with the first hyperparameters, and with the best of a random search."""
        source = self._run(split)
        found = {"not learnt": Baseline(source=source, hparams=self._first)}
        search = self._random_search()
        if search is not None:
            found["best random run"] = Baseline(source=source, hparams=self._drawn(search.best))
        return found

    def check_training(self, settings: TrainSettings) -> None:
        """Refuses a run of another length than `num_updates`."""
        refuse_other_length(settings, self.num_updates)

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the hyperparameters over the run beside the accuracy on the validation images, and the search."""
        after = range(0, self.num_updates * self.every + 1, self.every)
        plain = ht.unroll(self._run("validation"), self._first, metrics_after=after).metrics_after["accuracy"]
        search = self._random_search()
        best = None if search is None else (len(search.draws), 1.0 - min(search.losses))
        draw_run(folder / "metrics.jsonl", self.every, plain.tolist(), best, folder / "real_time.png")
        if search is not None:
            search.plot(
                folder / "random_search.png",
                label="validation error",
                reached=1.0 - logged(folder / "metrics.jsonl", "accuracy")[1][-1],
                reached_by="learnt in real time, at the end",
            )

    def _run(self, split: str) -> ht.BilevelProblem:
        """Returns the whole run, judged on a split."""
        return ht.BilevelProblem(
            self._inner,
            PrimaryHead(self._net, self.images[split].pairs(), first=self._first),
            dynamics=self._dynamics,
            num_steps=self.every * self.num_updates,
            seed=self.settings.seed,
        )

    def _hparams(self, lr: float, momentum: float, auxiliary: float) -> TensorDict:
        like = self.images["labelled"].inputs
        values = {"lr": lr, "momentum": momentum, "auxiliary": auxiliary}
        return {name: like.new_tensor(value) for name, value in values.items()}

    def _drawn(self, draw: Draw) -> TensorDict:
        return self._hparams(10.0 ** draw["log10_lr"], draw["momentum"], 10.0 ** draw["log10_auxiliary"])

    def _random_search(self) -> RandomSearch | None:
        """Returns the search, made once; None if there is to be none, or the CPU time is not known."""
        if self._search is None and self.search and self.training_cpu_seconds is not None:
            source = self._run("validation")

            def error(draw: Draw) -> float:
                try:
                    return 1.0 - float(ht.unroll(source, self._drawn(draw)).metrics["accuracy"])
                except NonFiniteError:
                    return math.inf

            self._search = random_search(_RANGES, error, cpu_seconds=self.training_cpu_seconds, seed=self.settings.seed)
        return self._search


class TwoHeads(ht.InnerProblem):
    """Trains a net whose first ten outputs name the digit, and whose other ones place the image in a map.

    Args:
        net: the net.
        labelled: images and labels of an inner step.
        mapped: other images, and their places.
    """

    def __init__(self, net: MLP, labelled: ht.Minibatches, mapped: ht.Minibatches) -> None:
        self._net = net
        self._labelled = labelled
        self._mapped = mapped

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights."""
        return self._net.draw(hparams["lr"])

    def batch(self, step: int) -> Batch:
        """Returns images and labels, and other images and their places."""
        return self._labelled(step), self._mapped(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy, with the weighted squared error of the auxiliary head."""
        (images, labels), (others, places) = batch
        primary = F.cross_entropy(self._net(params, images)[:, :CLASSES], labels)
        misplaced = (self._net(params, others)[:, CLASSES:] - places).square().sum(dim=1).mean()
        return primary + hparams["auxiliary"] * misplaced


class PrimaryHead(ht.OuterProblem):
    """Judges the net by the digits that its primary head names.

    Args:
        net: the net.
        data: images and labels.
        first: the hyperparameters where the run starts.
    """

    def __init__(self, net: MLP, data: tuple[Tensor, Tensor], *, first: TensorDict) -> None:
        self._net = net
        self._data = data
        self._first = first

    def init_hparams(self) -> TensorDict:
        """Returns learning rate, momentum and the weight of the auxiliary loss."""
        return dict(self._first)

    def constraints(self) -> Mapping[str, ht.Constraint]:
        """Returns the sets of numbers that the momentum and the weight are kept in."""
        return {"momentum": ht.Box(lower=0.0, upper=0.99), "auxiliary": ht.Box(lower=0.0)}

    def batch(self, outer_step: int) -> Batch:
        """Returns all images and labels."""
        return self._data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self._net(params, images)[:, :CLASSES], labels)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the accuracy."""
        images, labels = batch
        return {"accuracy": accuracy(self._net(params, images)[:, :CLASSES], labels)}


def neighbour_map(inputs: Tensor, axes: int) -> Tensor:
    """Returns a place for each image, shape `(images, axes)`, each coordinate with mean 0 and variance 1.

    They are the first eigenvectors of the Laplacian of the graph that joins each image with the ten nearest.

    Args:
        inputs: shape `(images, pixels)`.
        axes: coordinates of a place.

    References:
        Belkin and Niyogi (2003), Laplacian eigenmaps for dimensionality reduction and data representation.
    """
    embedding = SpectralEmbedding(axes, affinity="nearest_neighbors", n_neighbors=10, random_state=0)
    places = torch.as_tensor(embedding.fit_transform(inputs.cpu().numpy())).to(inputs)
    return (places - places.mean(dim=0)) / places.std(dim=0)


def draw_run(metrics: Path, every: int, plain: list[float], best: tuple[int, float] | None, path: Path) -> None:
    """Draws the hyperparameters over the run, beside the accuracy on the validation images.

    Args:
        metrics: the run's metrics.jsonl.
        every: inner steps between two updates.
        plain: accuracy of the run that learns nothing, before the first step and after every `every` steps.
        best: number of draws of the random search, and the best accuracy at the end; None without a search.
        path: the picture.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3), squeeze=False)[0]
    names = {"lr": "learning rate", "momentum": "momentum", "auxiliary": "weight of the\nauxiliary loss"}
    for position, (axes, (name, label)) in enumerate(zip(left.subplots(3, 1, sharex=True), names.items(), strict=True)):
        steps, values = logged(metrics, f"hparams/{name}")
        axes.plot([every * step for step in steps], values, color=COLOURS[position], linewidth=2)
        axes.set(ylabel=label, xlabel="inner step" if position == 2 else "")
        axes.grid(alpha=0.25)
    left.suptitle("Learnt while the net is trained")
    axes = right.subplots()
    right.suptitle("What that gives")
    steps, values = logged(metrics, "accuracy")
    axes.plot([every * step for step in steps], [100 * value for value in values], color=COLOURS[0], linewidth=2.5)
    axes.plot([every * step for step in range(len(plain))], [100 * value for value in plain], color=COLOURS[1], ls="--")
    labels = ["learnt in real time", "the same start, not learnt"]
    if best is not None:
        axes.axhline(100 * best[1], color=COLOURS[6], linestyle=":")
        labels.append(f"end of the best of {best[0]} random runs (equal CPU time)")
    axes.legend(labels, loc="lower right", frameon=False)
    axes.set(xlabel="inner step", ylabel="accuracy on validation images (%)")
    axes.set_ylim(bottom=max(0.0, 100 * min(plain[len(plain) // 8 :]) - 5))
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
