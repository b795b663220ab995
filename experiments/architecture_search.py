"""Which operation a net should have at each place, chosen by gradient descent on a mixture of all (DARTS).

scripts/train experiment=architecture_search
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.data_sets.digits import CLASSES, Images
from experiments.common.models.mlp import MLP, accuracy
from experiments.common.results.learning_curve import logged
from experiments.common.results.line_styles import COLOURS, MARKERS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline
from experiments.common.runs.seeds import Purpose
from hypertorch.types import Batch, TensorDict, TensorMapping

OPERATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "abs": torch.abs,
    "identity": lambda values: values,
    "sign": torch.sign,
    "zero": torch.zeros_like,
    "square": torch.square,
    "cube": lambda values: values**3,
}
"""Candidates by name: some useful, some useless, and some that a training can end in NaN with."""


@dataclass(eq=False, repr=False, kw_only=True)
class ArchitectureSearch(DigitsExperiment):
    """Learns which operation follows each hidden layer, by weights of a mixture of all candidates.

    Every image is, at random, as it is or as its negative: even functions see what both have in common, odd ones do
    not, and so the candidates differ.

    An outer step trains a net with the mixtures from new first weights; the weights of the mixtures follow the
    hypergradient of the validation loss. At the end each layer keeps its heaviest operation, and the net is trained
    anew. Before all that, each operation is trained alone, in every layer: one that ends in NaN is taken out of the
    mixtures, where it would make everything NaN, and the others are what the weights are ranked against.

    Args:
        sizes: images for "train", "validation" and "test"; 0 for all that are left over.
        operations: names of the candidates.
        hidden: widths of the hidden layers, each of which has a choice.
        batch_size: images in a minibatch of an inner step.
        num_steps: the horizon of an outer step (unit: inner steps).
        final_steps: the horizon of operations alone and of the final evaluation (unit: inner steps).
        num_alone: trainings of each operation alone, with first weights of their own.
    """

    splits = ("validation", "test")
    metric = "outer_loss"
    mode = "min"

    operations: Sequence[str] = tuple(OPERATIONS)
    hidden: Sequence[int] = (24,)
    batch_size: int = 100
    num_steps: int = 100
    final_steps: int = 100
    num_alone: int = 3

    def __post_init__(self) -> None:
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown or len(set(self.operations)) < max(2, len(self.operations)):
            raise ExpectedFailure(
                f"`experiment.operations` is {list(self.operations)}: there is a choice between two or more different "
                f"ones. Use some of {list(OPERATIONS)}."
            )
        images = self.digit_splits()
        self._images = {split: with_negatives(own, seed=self.settings.seed) for split, own in images.items()}
        self._operations = tuple(self.operations)
        self._mlp = MLP((self._images["train"].inputs.shape[1], *self.hidden, CLASSES))
        self._dynamics: ht.Dynamics = build(self.config, "dynamics")

    @cached_property
    def alone(self) -> dict[str, float]:
        """The validation loss that each operation reaches in all layers, the mean over seeds; NaN or infinity too."""
        found = {}
        for name in self._operations:
            source = self._runs("search", self._alone(name), "validation")
            runs = [ht.unroll(source.at(seed), self._first(), outer_step=seed) for seed in range(self.num_alone)]
            found[name] = sum(float(run.outer_loss) for run in runs) / len(runs)
        if sum(math.isfinite(loss) for loss in found.values()) < 2:
            raise ExpectedFailure(
                f"`experiment.operations` is {list(self.operations)}, but alone they end at the validation losses "
                f"{list(found.values())}: fewer than two can be trained. Lower dynamics.lr."
            )
        return found

    def training(self) -> ht.ProblemSource:
        """Returns a run with the mixtures from new first weights for every outer step."""
        return self._runs("training", self._mixed(), "validation", num_steps=self.num_steps, shows_weights=True)

    def validation(self) -> ht.ProblemSource:
        """Returns the same with other first weights and minibatches."""
        return self._runs("validation", self._mixed(), "validation", num_steps=self.num_steps)

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns long runs of nets with the heaviest operation of each layer alone."""
        return self._runs("evaluation", replace(self._mixed(), is_cut=True), split, seed=seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns each operation alone, in all layers, and the mixture of all with equal weights."""
        nets = {f"{name} alone": self._alone(name) for name, loss in self.alone.items() if math.isfinite(loss)}
        return {
            name: Baseline(source=self._runs("evaluation", net, split), hparams=self._first())
            for name, net in {**nets, "equal mixture": self._mixed()}.items()
        }

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the weights over the outer steps, and against what each operation reaches alone."""
        weights = mean_weights(self._mixed().mixture(hparams))
        draw_choice(weights, self.alone, folder / "metrics.jsonl", folder / "choice.png")

    def _first(self) -> TensorDict:
        """Returns equal weights of all operations."""
        return {"choice": self._images["train"].inputs.new_zeros(len(self._mlp.layers) - 1, len(self._operations))}

    def _alone(self, name: str) -> MixedNet:
        others = tuple(other for other in self._operations if other != name)
        return MixedNet(mlp=self._mlp, operations=self._operations, left_out=others)

    def _mixed(self) -> MixedNet:
        lost = tuple(name for name, loss in self.alone.items() if not math.isfinite(loss))
        return MixedNet(mlp=self._mlp, operations=self._operations, left_out=lost)

    def _runs(
        self,
        purpose: Purpose,
        net: MixedNet,
        split: str,
        *,
        num_steps: int | None = None,
        seed: int | None = None,
        shows_weights: bool = False,
    ) -> ht.ProblemSource:
        """Returns a run with first weights and minibatches of its own for every outer step; long ones for None."""
        train = TensorDataset(*self._images["train"].pairs())
        outer = Judged(
            net=net,
            images=self._images[split],
            first=self._first(),
            alone=self.alone if net.is_cut else None,
            shows_weights=shows_weights,
        )

        def problem(own: int) -> ht.BilevelProblem:
            return ht.BilevelProblem(
                Training(net=net, batches=ht.Minibatches(train, self.batch_size, seed=own)),
                outer,
                dynamics=self._dynamics,
                num_steps=self.final_steps if num_steps is None else num_steps,
                seed=own,
            )

        return self.reseeded(purpose, problem, seed=seed)


def with_negatives(images: Images, *, seed: int) -> Images:
    """Returns the same images with pixels from -1 to 1, every one, at random, as it is or as its negative."""
    signs = torch.randint(2, (len(images), 1), generator=torch.Generator().manual_seed(seed)).to(images.inputs)
    return Images(inputs=(2.0 * images.inputs - 1.0) * (2.0 * signs - 1.0), labels=images.labels)


Mixture = list[dict[str, Tensor]]
"""The weights of the operations that take part, by name, for each layer."""


@dataclass(frozen=True, kw_only=True)
class MixedNet:
    """A fully connected net with a mixture of operations in each layer: `h = sum_o p_o o(W h + b)`, `p = softmax(a)`.

    Args:
        mlp: names and shapes of the weights.
        operations: the candidates.
        left_out: those that take no part.
        is_cut: whether the heaviest operation of each layer is all of it.
    """

    mlp: MLP
    operations: tuple[str, ...]
    left_out: tuple[str, ...]
    is_cut: bool = False

    def mixture(self, hparams: TensorMapping) -> Mixture:
        """Returns the weights `p` from the outer variables `a`, `choice` of shape `(layers, operations)`."""
        kept = [index for index, name in enumerate(self.operations) if name not in self.left_out]
        layers = hparams["choice"][:, kept].softmax(dim=1)
        # Left out for good, not given the weight 0: 0 times NaN is NaN.
        names = [self.operations[index] for index in kept]
        if self.is_cut:
            return [{names[int(own.argmax())]: torch.ones_like(own[0])} for own in layers]
        return [dict(zip(names, own, strict=True)) for own in layers]

    def __call__(self, params: TensorMapping, mixture: Mixture, images: Tensor) -> Tensor:
        """Returns the outputs, shape `(images, classes)`."""
        values, (*hidden, last) = images, self.mlp.layers
        for layer, weights in zip(hidden, mixture, strict=True):
            values = F.linear(values, params[f"{layer}.weight"], params[f"{layer}.bias"])
            values = torch.stack([weight * OPERATIONS[name](values) for name, weight in weights.items()]).sum(dim=0)
        return F.linear(values, params[f"{last}.weight"], params[f"{last}.bias"])


class Training(ht.InnerProblem):
    """Trains a net, with the mixture that the outer variables say.

    Args:
        net: the net.
        batches: images and labels of an inner step.
    """

    def __init__(self, *, net: MixedNet, batches: ht.Minibatches) -> None:
        self._net = net
        self._batches = batches

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights."""
        return self._net.mlp.draw(hparams["choice"])

    def batch(self, step: int) -> Batch:
        """Returns images and labels."""
        return self._batches(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self._net(params, self._net.mixture(hparams), images), labels)


class Judged(ht.OuterProblem):
    """Judges the trained net by its cross-entropy.

    Args:
        net: the net.
        images: what it is judged on.
        first: the outer variables before the first outer step.
        alone: the loss of each operation alone, which the weights are ranked against; None for no ranking.
        shows_weights: whether to report the weights of the operations, as means over layers.
    """

    def __init__(
        self,
        *,
        net: MixedNet,
        images: Images,
        first: TensorDict,
        alone: Mapping[str, float] | None,
        shows_weights: bool,
    ) -> None:
        self._net = net
        self._images = images
        self._first = first
        self._alone = alone
        self._shows_weights = shows_weights

    def init_hparams(self) -> TensorDict:
        """Returns equal weights, as zeros."""
        return dict(self._first)

    def batch(self, outer_step: int) -> Batch:
        """Returns all images and labels."""
        return self._images.pairs()

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self._net(params, self._net.mixture(hparams), images), labels)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the accuracy and, if asked for, the weights and how far they rank as the operations do alone."""
        images, labels = batch
        found = {"accuracy": accuracy(self._net(params, self._net.mixture(hparams), images), labels)}
        weights = mean_weights(replace(self._net, is_cut=False).mixture(hparams))
        if self._alone is not None:
            found["rank_correlation"] = images.new_tensor(rank_correlation(weights, self._alone))
        if self._shows_weights:
            found |= {f"weight_{name}": images.new_tensor(weight) for name, weight in weights.items()}
        return found


def mean_weights(mixture: Mixture) -> dict[str, float]:
    """Returns the weight of each operation, the mean over layers."""
    return {name: sum(float(layer[name]) for layer in mixture) / len(mixture) for name in mixture[0]}


def rank_correlation(weights: Mapping[str, float], alone: Mapping[str, float]) -> float:
    """Returns Spearman's correlation of the weights with the negated losses of the operations alone."""
    both = torch.tensor([list(weights.values()), [-alone[name] for name in weights]], dtype=torch.float64)
    return float(both.argsort(dim=1).argsort(dim=1).double().corrcoef()[0, 1])


def draw_choice(weights: Mapping[str, float], alone: Mapping[str, float], metrics: Path, path: Path) -> None:
    """Draws the weights of the operations over the outer steps, and against their losses alone.

    Args:
        weights: of the operations that take part, the means over layers.
        alone: validation loss of every operation alone.
        metrics: the run's metrics.jsonl.
        path: the picture.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    over, against = figure.subplots(1, 2)
    styles = dict(zip(alone, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    for name, weight in weights.items():
        colour, marker = styles[name]
        over.plot(*logged(metrics, f"weight_{name}"), color=colour, marker=marker, markevery=0.1, label=name)
        against.plot(alone[name], weight, color=colour, marker=marker, markersize=10, linestyle="none", label=name)
    over.set(xlabel="outer step", ylabel="weight in the mixture, mean over layers", ylim=(0.0, None))
    over.set_title("Learnt together")
    against.set(xlabel="validation loss of the operation alone", ylabel="learnt weight", yscale="log", xscale="log")
    against.set_title(f"Rank correlation {rank_correlation(weights, alone):.2f}")
    lost = [name for name in alone if name not in weights]
    if lost:
        figure.suptitle(f"Left out, since alone they end in no finite loss: {', '.join(lost)}", fontsize=10)
    over.legend(frameon=False, fontsize=9)
    against.legend(frameon=False, fontsize=9)
    for axis in (against.xaxis, against.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    for axes in (over, against):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=90)
