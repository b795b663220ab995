"""Where a search starts: at what was best on the data sets that are near to the new one, by a learnt distance.

scripts/train experiment=warm_start
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.settings import ProblemSettings
from experiments.common.data_sets.digit_sets import Configurations, DigitSet, draw_sets, validation_losses
from experiments.common.data_sets.digits import CLASSES, DigitsName, digit_splits
from experiments.common.results.line_styles import COLOURS, line_styles
from experiments.common.runs.experiment import Baseline, Experiment, refuse_other_problems
from hypertorch.types import Batch, TensorDict

_EVALUATIONS = 5  # of a search, in the figures
_NUM_RANDOM = 20  # random orders of each data set
_SPLITS = ("train", "validation", "test")
_TINY = 1e-12


class WarmStart(Experiment):
    """Learns a distance between data sets from their examples, by which a search on a new one is started.

    Every data set is a few noisy digits, and every configuration, a learning rate and an L2 penalty, was trained on
    each of those that the distance is learnt from. Those that choose the weights and those of the test have other
    images. The true distance is the mean absolute difference of the logarithms of the losses.

    Args:
        config: the configuration.
        settings: the plain settings of all experiments.
        pools: images that data sets are made of: "train", "validation" and "test"; 0 for all that are left over.
        num_sets: data sets: "train", "validation" and "test".
        data: "digits" (embedded) or "mnist".
        root: the folder of MNIST's files; None for the embedded digits.
        train_images: least and greatest number of training images of a data set.
        validation_images: of each data set.
        num_lr: learning rates in the grid of configurations, geometric over `lr`.
        lr: least and greatest learning rate.
        num_l2: penalties in the grid, geometric over `l2`.
        l2: least and greatest penalty.
        num_steps: of the training of a configuration (unit: steps).
        width: units of the hidden layers of the network.
        num_outputs: entries of an embedding.
        batch_size: data sets whose pairs make an outer step.
        num_examples: examples of each that are drawn for it; None for all.
        num_neighbours: None starts a search at the best configurations of the nearest data sets, one after the other;
            a number starts it at the greedy portfolio of that many nearest data sets.
    """

    splits = ("validation", "test")
    metric = "correlation"
    mode = "max"

    def __init__(
        self,
        config: DictConfig,
        settings: ProblemSettings,
        *,
        pools: Mapping[str, int],
        num_sets: Mapping[str, int],
        data: DigitsName = "digits",
        root: str | None = None,
        train_images: Sequence[int] = (16, 64),
        validation_images: int = 120,
        num_lr: int = 7,
        lr: Sequence[float] = (0.01, 3.0),
        num_l2: int = 7,
        l2: Sequence[float] = (1e-4, 0.3),
        num_steps: int = 30,
        width: int = 128,
        num_outputs: int = 16,
        batch_size: int = 32,
        num_examples: int | None = 16,
        num_neighbours: int | None = None,
    ) -> None:
        super().__init__(config, settings)
        _check_sets(num_sets, {"batch_size": batch_size, "num_neighbours": num_neighbours})
        _check_grid({"train_images": train_images, "lr": lr, "l2": l2}, num_lr * num_l2)
        images = digit_splits(data, pools, root=root, seed=settings.seed, device=settings.device, dtype=settings.dtype)
        generator = torch.Generator().manual_seed(settings.seed)
        least, greatest = train_images
        self.sets = {
            split: draw_sets(
                images[split],
                num_sets[split],
                sizes=(least, greatest),
                num_validation=validation_images,
                generator=generator,
            )
            for split in _SPLITS
        }
        like = images["train"].inputs
        grid = torch.cartesian_prod(_geometric(lr, num_lr), _geometric(l2, num_l2)).to(like)
        self.configurations = Configurations(lr=grid[:, 0], l2=grid[:, 1])
        self._num_steps, self._num_neighbours = num_steps, num_neighbours
        self._batch_size, self._num_examples = batch_size, num_examples
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = ht.search.DeepSet(like.shape[1] + CLASSES, width=width, num_outputs=num_outputs).to(like)
        self.distance = ht.search.DatasetDistance(network)

    @cached_property
    def losses(self) -> dict[str, Tensor]:
        """What the configurations reach on the data sets of each split, shape `(sets, configurations)`."""
        return {
            split: validation_losses(sets, self.configurations, num_steps=self._num_steps)
            for split, sets in self.sets.items()
        }

    def examples(self, split: str) -> list[Tensor]:
        """Returns what the network sees of the data sets of a split."""
        return [one.examples() for one in self.sets[split]]

    def training(self) -> ht.BilevelProblem:
        """Returns the error of the learnt distance over pairs of data sets, others at each step."""
        return self.distance.problem(
            self.examples("train"),
            _logs(self.losses["train"]),
            batch_size=self._batch_size,
            num_examples=self._num_examples,
            seed=self.settings.seed,
        )

    def validation(self) -> ht.ProblemSource:
        """Returns the starts of searches on data sets that choose the weights."""
        return self.evaluation("validation")

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the starts of searches on the data sets of a split, from those of training.

        Raises:
            ExpectedFailure: if others are asked for: there are none.
        """
        refuse_other_problems(seed)
        own = self.examples(split)
        true = ht.search.loss_distances(_logs(self.losses[split]), _logs(self.losses[split]))
        return self._judged(
            split,
            lambda weights: self.starts(self.learnt_distances(weights, split)),
            lambda weights: {"correlation": correlation(self.distance(weights, own, own), true)},
        )

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns the starts that need no learning, from the same data sets of training."""
        # Its weights take no part.
        hparams = self.distance.init_hparams()
        return {
            name: Baseline(source=self._judged(split, lambda _, orders=orders: orders), hparams=hparams)
            for name, orders in self.other_starts(split).items()
        }

    def other_starts(self, split: str) -> dict[str, list[list[int]]]:
        """Returns, for each method and each data set of a split, the configurations in the order of a search.

        With several orders for a data set, those of all data sets follow each other again and again.
        """
        known, count = self.losses["train"], len(self.sets[split])
        generator = torch.Generator().manual_seed(self.settings.seed)
        shuffled = [torch.randperm(known.shape[1], generator=generator) for _ in range(_NUM_RANDOM * count)]
        own, others = (torch.stack([meta_features(one) for one in self.sets[name]]) for name in (split, "train"))
        mean, deviation = others.mean(dim=0), others.std(dim=0)
        apart = torch.cdist((own - mean) / deviation, (others - mean) / deviation)
        true = ht.search.loss_distances(_logs(self.losses[split]), _logs(known))
        return {
            "hand-made features": self.starts(apart),
            "greedy portfolio": [ht.search.greedy_portfolio(known, _EVALUATIONS)] * count,
            "best on average": [known.mean(dim=0).argsort()[:_EVALUATIONS].tolist()] * count,
            "random": [order[:_EVALUATIONS].tolist() for order in shuffled],
            "true distance": self.starts(true),
        }

    def learnt_distances(self, weights: TensorDict, split: str) -> Tensor:
        """Returns those of the data sets of a split from those of training, shape `(sets, training sets)`."""
        return self.distance(weights, self.examples(split), self.examples("train"))

    def starts(self, distances: Tensor) -> list[list[int]]:
        """Returns the order of the search on each data set, from its distances from those of training."""
        known = self.losses["train"]
        if self._num_neighbours is None:
            return [ht.search.nearest_best(row, known, _EVALUATIONS) for row in distances]
        nearest = distances.argsort(dim=1, stable=True)[:, : self._num_neighbours]
        return [ht.search.greedy_portfolio(known[row], _EVALUATIONS) for row in nearest]

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the learnt against the true distance of pairs of the test, and the regrets of all starts."""
        own, losses = self.examples("test"), self.losses["test"]
        first, second = _pairs(len(own), losses.device)
        true = ht.search.loss_distances(_logs(losses), _logs(losses))[first, second]
        learnt = self.distance(hparams, own, own)[first, second]
        starts = {"learnt distance": self.starts(self.learnt_distances(hparams, "test")), **self.other_starts("test")}
        curves = {name: mean_regrets(losses, orders) for name, orders in starts.items()}
        draw_starts(true, learnt, curves, folder / "warm_start.png")

    def _judged(
        self,
        split: str,
        start: Callable[[TensorDict], list[list[int]]],
        further: Callable[[TensorDict], TensorDict] = lambda _: {},
    ) -> ht.BilevelProblem:
        outer = JudgedStarts(self.distance, self.losses[split], start, further)
        return replace(self.training(), outer=outer)


class JudgedStarts(ht.OuterProblem):
    """Judges the first evaluations of searches by their regret: the mean over data sets.

    Args:
        distance: whose weights are the outer variables.
        losses: on the data sets that are searched, shape `(sets, configurations)`.
        start: from the weights to the order of each search.
        further: from the weights to further figures.
    """

    def __init__(
        self,
        distance: ht.search.DatasetDistance,
        losses: Tensor,
        start: Callable[[TensorDict], list[list[int]]],
        further: Callable[[TensorDict], TensorDict],
    ) -> None:
        self._distance = distance
        self._losses = losses
        self._start = start
        self._further = further

    def init_hparams(self) -> TensorDict:
        """Returns the network's own weights."""
        return self._distance.init_hparams()

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the mean of the regrets after each of the evaluations."""
        return mean_regrets(self._losses, self._start(hparams)).mean()

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the regrets after 1, 3 and 5 evaluations, and further figures."""
        found = mean_regrets(self._losses, self._start(hparams))
        return {**{f"regret_{count}": found[count - 1] for count in (1, 3, 5)}, **self._further(hparams)}


def mean_regrets(losses: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Returns the regret after each evaluation, as a mean over orders, shape `(evaluations,)`.

    Args:
        losses: shape `(sets, configurations)`.
        orders: for the data sets in turn, again and again if there are more.
    """
    found = [ht.search.regrets(losses[place % len(losses)], order) for place, order in enumerate(orders)]
    return torch.stack(found).mean(dim=0)


def correlation(learnt: Tensor, true: Tensor) -> Tensor:
    """Returns Pearson's correlation of two matrices of distances over the pairs of different data sets, shape `()`."""
    first, second = _pairs(len(true), true.device)
    return torch.corrcoef(torch.stack([learnt[first, second], true[first, second]]))[0, 1]


def meta_features(one: DigitSet) -> Tensor:
    """Returns the logarithms of the number of examples and of the standard deviation of the pixels, shape `(2,)`."""
    inputs = one.train.inputs
    return torch.stack([inputs.new_tensor(len(inputs)), inputs.std()]).log()


def draw_starts(true: Tensor, learnt: Tensor, curves: Mapping[str, Tensor], path: Path) -> None:
    """Draws the distances of pairs, and regrets by the number of evaluations.

    Args:
        true: distances of pairs of data sets by their losses, shape `(pairs,)`.
        learnt: the same pairs, by their examples.
        curves: mean regret after each evaluation, by method.
        path: the picture.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    pairs, starts = figure.subplots(1, 2)
    far = float(torch.cat([true, learnt]).max())
    share = float(torch.corrcoef(torch.stack([true, learnt]))[0, 1])
    pairs.plot([0.0, far], [0.0, far], color="0.5", linestyle="--", linewidth=1.0, label="equal")
    pairs.plot(true.cpu(), learnt.cpu(), ".", color=COLOURS[0], alpha=0.35, markersize=4, label="pair of data sets")
    pairs.set(
        xlabel="true distance: mean |difference of log losses|",
        ylabel="learnt distance, from examples alone",
        title=f"Pairs of unseen data sets (correlation {share:.2f})",
    )
    for (name, curve), style in zip(curves.items(), line_styles(curves).values(), strict=True):
        starts.plot(range(1, len(curve) + 1), curve.clamp_min(_TINY).cpu(), **style, label=name)
    starts.set(
        xlabel="evaluations on the new data set",
        ylabel="mean regret (cross-entropy above the best)",
        yscale="log",
        title="Start of a search on unseen data sets",
        xticks=range(1, _EVALUATIONS + 1),
    )
    for axes in (pairs, starts):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=85)


def _check_sets(num_sets: Mapping[str, int], at_once: Mapping[str, int | None]) -> None:
    if set(num_sets) != set(_SPLITS) or min(num_sets.values()) < 3:
        raise ExpectedFailure(
            f"`experiment.num_sets` is {dict(num_sets)}: there are data sets to learn from, to choose by and to test "
            "on, and a correlation needs several pairs. Write 3 or more for train, validation and test."
        )
    for name, least in (("batch_size", 2), ("num_neighbours", 1)):
        count = at_once[name]
        if count is not None and not least <= count <= num_sets["train"]:
            raise ExpectedFailure(
                f"`experiment.{name}` is {count}, but it is a number of the {num_sets['train']} data sets of training. "
                f"Write {least} to {num_sets['train']}."
            )


def _check_grid(ranges: Mapping[str, Sequence[float]], num_configurations: int) -> None:
    for name, ends in ranges.items():
        if len(ends) != 2 or not 0 < ends[0] < ends[1]:
            raise ExpectedFailure(
                f"`experiment.{name}` is {list(ends)}: values are geometric from the least to the greatest. Write two "
                "numbers above 0, the smaller first."
            )
    if num_configurations < _EVALUATIONS:
        raise ExpectedFailure(
            f"`experiment.num_lr` times `experiment.num_l2` is {num_configurations}, but a search has {_EVALUATIONS} "
            f"evaluations, each of another configuration. Write numbers whose product is at least {_EVALUATIONS}."
        )


def _geometric(ends: Sequence[float], count: int) -> Tensor:
    return torch.linspace(math.log(ends[0]), math.log(ends[1]), count, dtype=torch.float64).exp()


def _logs(losses: Tensor) -> Tensor:
    return losses.clamp_min(_TINY).log()


def _pairs(count: int, device: torch.device) -> Tensor:
    return torch.triu_indices(count, count, offset=1, device=device)
