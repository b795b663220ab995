"""Which training examples to use: a weight for each of them, or a net that scores them, learnt by exact metagradients.

scripts/train experiment=data_selection
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.data_sets.alphabets import load_alphabets
from experiments.common.data_sets.digits import CLASSES, Images
from experiments.common.models.labelled_images import CleanImages
from experiments.common.models.mlp import MLP
from experiments.common.results.image_grid import draw_image_grid
from experiments.common.results.line_styles import COLOURS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline
from experiments.common.runs.seeds import Purpose, run_seed
from hypertorch.autodiff.noise import mix
from hypertorch.types import Batch, TensorDict

SelectorName: TypeAlias = Literal["weights", "scorer"]
"""A number for each example, or a net that maps image and label to a number."""
NormName: TypeAlias = Literal["none", "before", "after"]
"""Where the hidden units are normalised: nowhere, before or after the activation."""

KINDS = ("right", "wrong label", "copy", "no digit")
_GRID = (4, 9)


@dataclass(eq=False, repr=False, kw_only=True)
class DataSelection(DigitsExperiment):
    """Learns how much each example of a pool counts in training, by the loss on clean images after it.

    Half of the pool is junk: images with a wrong label, copies of a few images, and made-up characters with random
    labels. Each outer step trains a new net on the weighted pool, with other minibatches, and differentiates through
    all of its steps. The outcome is judged by training new nets with the learnt weights. The nets that it is compared
    with take as many steps of the same size, without weights, on all of the pool or a part of it.

    Args:
        sizes: digits of "pool" (a quarter gets wrong labels; with the other junk it has half as many examples more), of
            "validation" (the clean images) and "test", and with a scorer of "new_pool", a pool that it has not seen; 0
            for all that are left over.
        selector: "weights" (a number for each example) or "scorer" (a net, which weighs other examples too).
        num_copied: images of which all copies are made.
        scorer_hidden: width of the scorer's hidden layer.
        hidden: width of the classifier's hidden layer.
        norm: where the classifier's hidden units are normalised: "none", "before" or "after" the activation.
        batch_size: examples in a minibatch.
        num_steps: the horizon, while weights are learnt and of the nets that are judged (unit: inner steps).
    """

    metric = "outer_loss"
    mode = "min"
    published: ClassVar = {
        "metagradient descent (Engstrom et al. 2025), DataRater (2025)": "on text and image-text data, not comparable",
    }

    selector: SelectorName = "weights"
    num_copied: int = 10
    scorer_hidden: int = 64
    hidden: int = 100
    norm: NormName = "none"
    batch_size: int = 100
    num_steps: int = 100

    def __post_init__(self) -> None:
        seed = self.settings.seed
        check_pools(self.selector, self.sizes)
        self.images = self.digit_splits()
        self.pools = {
            name: junk_pool(self.images[name], self.num_copied, seed=mix(seed, index))
            for index, name in enumerate(("pool", "new_pool"))
            if name in self.sizes
        }
        pixels = self.images["pool"].inputs.shape[1]
        self._selector = selector_named(self.selector, self.pools["pool"], self.scorer_hidden, seed=seed)
        self.splits = ("validation", "new_pool", "test") if "new_pool" in self.sizes else ("validation", "test")
        self._net = MLP((pixels, self.hidden, CLASSES), activation_named(self.norm))
        self._dynamics: ht.Dynamics = build(self.config, "dynamics")

    def training(self) -> ht.ProblemSource:
        """Returns the training of a new net on the weighted pool at every outer step, judged on clean images."""
        return self._weighted("training", "validation", "pool")

    def validation(self) -> ht.ProblemSource:
        """Returns the same with other seeds: the clean images choose the outer step too."""
        return self._weighted("validation", "validation", "pool")

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns trainings with fresh seeds; "new_pool" are trainings on that, judged on the test images."""
        return self._weighted("evaluation", split, "new_pool" if split == "new_pool" else "pool", seed=seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns trainings on all of the pool and on parts of it, and on the clean images alone."""
        if split == "validation":
            return {}
        name = "new_pool" if split == "new_pool" else "pool"
        pool = self.pools[name]
        order = self._losses[name].argsort()
        half = len(pool) // 2
        parts: dict[str, Callable[[int], Tensor]] = {
            "all of the pool": lambda _: torch.arange(len(pool)),
            "random halves": lambda own: torch.randperm(len(pool), generator=torch.Generator().manual_seed(own))[:half],
            "half with the lowest loss, once trained": lambda _: order[:half],
            "half with the highest loss, once trained": lambda _: order[half:],
            "the half without junk": lambda _: (pool.kinds == 0).nonzero()[:, 0],
        }
        sources = {label: self._fixed(split, pool, part) for label, part in parts.items()}
        clean = self.images["validation"]
        only = Pool(inputs=clean.inputs, labels=clean.labels, true=clean.labels, kinds=torch.zeros_like(clean.labels))
        sources["clean images alone"] = self._fixed(split, only, lambda _: torch.arange(len(only)))
        return {label: Baseline(source=source, hparams=self._selector.first()) for label, source in sources.items()}

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the weights of each kind of example, and those that weigh least."""
        name, pool = list(self.pools.items())[-1]
        with torch.no_grad():
            weights = self._selector(hparams, pool).sigmoid()
        where = "examples that it was not trained with" if name == "new_pool" else "examples"
        draw_selection(weights, pool, where, folder / "selection.png")

    @cached_property
    def _losses(self) -> Mapping[str, Tensor]:
        """Losses of the examples of each pool, after training on all of it."""
        found = {}
        for name, pool in self.pools.items():
            run = self._fixed("validation", pool, lambda _, pool=pool: torch.arange(len(pool))).at(0)
            params = ht.unroll(run, self._selector.first()).params
            found[name] = F.cross_entropy(self._net(params, pool.inputs), pool.labels, reduction="none")
        return found

    def _weighted(self, purpose: Purpose, split: str, name: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns trainings on a pool with the weights that the selector gives its examples."""
        pool = self.pools[name]
        everything = torch.arange(len(pool), device=pool.labels.device)

        def weighted(hparams: TensorDict, _: Batch) -> TensorDict:
            weights = self._selector(hparams, pool).sigmoid()
            # A step has the same size whatever the mean.
            return {"chosen": everything, "weights": weights / weights.mean()}

        return self._runs(purpose, split, pool, len(pool), weighted, seed=seed)

    def _fixed(self, split: str, pool: Pool, part: Callable[[int], Tensor]) -> ht.ProblemSource:
        """Returns trainings on a part of the pool, which may depend on the run's seed."""

        def problem(index: int) -> ht.BilevelProblem:
            chosen = part(run_seed(self.settings.seed, "evaluation", index)).to(pool.labels.device)
            return self._runs("evaluation", split, pool, len(chosen), lambda *_: {"chosen": chosen}).at(index)

        return ht.Problems(problem)

    def _runs(
        self,
        purpose: Purpose,
        split: str,
        pool: Pool,
        num_chosen: int,
        context: Callable[[TensorDict, Batch], TensorDict],
        *,
        seed: int | None = None,
    ) -> ht.ProblemSource:
        """Returns trainings with first weights and minibatches of their own, on what the context says."""
        judged = self.images["validation" if split == "validation" else "test"]

        def problem(own: int) -> ht.BilevelProblem:
            places = TensorDataset(torch.arange(num_chosen, device=pool.labels.device))
            return ht.BilevelProblem(
                ChosenExamples(self._net, pool, ht.Minibatches(places, self.batch_size, seed=own)),
                CleanImages(
                    data=judged.pairs(),
                    first=self._selector.first(),
                    figures=lambda variables: {"junk_share": junk_share(variables, pool)},
                    net=self._net,
                ),
                dynamics=self._dynamics,
                num_steps=self.num_steps,
                context=context,
                seed=own,
            )

        return self.reseeded(purpose, problem, seed=seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Examples to choose from.

    Args:
        inputs: pixels, shape `(examples, pixels)`.
        labels: as given, shape `(examples,)`.
        true: the true labels, -1 for what is no digit.
        kinds: positions in `KINDS`, 0 for what is no junk.
    """

    inputs: Tensor
    labels: Tensor
    true: Tensor
    kinds: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def junk_pool(images: Images, num_copied: int, *, seed: int) -> Pool:
    """Returns a pool of which half is junk, a third of that of each kind.

    Three quarters of the images have their right label. The last quarter has another one, drawn uniformly. As many
    copies are made of the first `num_copied` images, and as many made-up characters have a random label.

    Args:
        images: the digits.
        num_copied: images of which all copies are made.
        seed: of the draws.

    Raises:
        ExpectedFailure: if there are too few images.
    """
    part = len(images) // 4
    if not 0 < num_copied <= part:
        raise ExpectedFailure(
            f"`experiment.num_copied` is {num_copied}, but a pool of {len(images)} digits has copies of 1 to {part} "
            "images. Choose a number in that range, or a larger pool."
        )
    generator = torch.Generator().manual_seed(seed)
    characters = -(-part // 400)  # twenty drawings of each of ten, upright and turned
    strange = load_alphabets(
        "strokes",
        root=None,
        num_alphabets=characters,
        num_characters=10,
        num_drawings=20,
        image_size=images.side,
        seed=seed,
    )
    strange_inputs = strange.images.flatten(0, 2).to(images.inputs)
    strange_inputs = strange_inputs[torch.randperm(len(strange_inputs), generator=generator)[:part]]
    right, wrong = images[: 3 * part], images[3 * part : 4 * part]
    shift = torch.randint(1, CLASSES, (part,), generator=generator).to(images.labels.device)
    copied = right[torch.arange(part) % num_copied]
    random = torch.randint(CLASSES, (part,), generator=generator).to(images.labels.device)
    sizes = torch.tensor([3 * part, part, part, part])
    return Pool(
        inputs=torch.cat([right.inputs, wrong.inputs, copied.inputs, strange_inputs]),
        labels=torch.cat([right.labels, (wrong.labels + shift) % CLASSES, copied.labels, random]),
        true=torch.cat([right.labels, wrong.labels, copied.labels, torch.full_like(random, -1)]),
        kinds=torch.arange(len(KINDS)).repeat_interleave(sizes).to(images.labels.device),
    )


def junk_share(variables: TensorDict, pool: Pool) -> Tensor:
    """Returns the share of junk in what a run trains on, each example counted by its weight, shape `()`."""
    is_junk = (pool.kinds[variables["chosen"]] > 0).to(pool.inputs.dtype)
    weights = variables.get("weights", torch.ones_like(is_junk))
    return (weights * is_junk).sum() / weights.sum()


class ExampleScores:
    """A score for each example of one pool, which is learnt.

    Args:
        pool: the pool.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def first(self) -> TensorDict:
        """Returns equal scores."""
        return {"score": self._pool.inputs.new_zeros(len(self._pool))}

    def __call__(self, hparams: TensorDict, pool: Pool) -> Tensor:
        """Returns the scores, shape `(examples,)`; of that pool alone."""
        assert pool is self._pool
        return hparams["score"]


class Scorer:
    """A net that maps an image to a score for each label that it could be given.

    Args:
        net: the net.
        first: its first weights.
    """

    def __init__(self, net: MLP, first: TensorDict) -> None:
        self._net = net
        self._first = first

    def first(self) -> TensorDict:
        """Returns the first weights, which score all examples nearly alike."""
        return dict(self._first)

    def __call__(self, hparams: TensorDict, pool: Pool) -> Tensor:
        """Returns the score of each image under its label, shape `(examples,)`."""
        return self._net(hparams, pool.inputs).gather(1, pool.labels[:, None])[:, 0]


def check_pools(selector: SelectorName, sizes: Mapping[str, int]) -> None:
    """Refuses a second pool that nothing would use, and none where a scorer is to be judged on one.

    Raises:
        ExpectedFailure: saying what to write.
    """
    if ("new_pool" in sizes) != (selector == "scorer"):
        raise ExpectedFailure(
            f"`experiment.selector` is {selector!r}, but `experiment.sizes` are those of {', '.join(sizes)}: a new "
            "pool is weighed by a scorer, and by nothing else. Write ~experiment.sizes.new_pool with weights, and "
            "+experiment.sizes.new_pool=480 with a scorer."
        )


def selector_named(name: SelectorName, pool: Pool, hidden: int, *, seed: int) -> ExampleScores | Scorer:
    """Returns what scores examples.

    Args:
        name: "weights" or "scorer".
        pool: that it is learnt with.
        hidden: width of the scorer's hidden layer.
        seed: of the scorer's first weights.

    Raises:
        ExpectedFailure: if there is no such selector.
    """
    if name == "weights":
        return ExampleScores(pool)
    if name != "scorer":
        raise ExpectedFailure(f"`experiment.selector` is {name!r}, which selects nothing. Use weights or scorer.")
    net = MLP((pool.inputs.shape[1], hidden, CLASSES), torch.relu)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = net.draw(pool.inputs)
    # Not zero: the layer before would have no hypergradient until this one has moved.
    return Scorer(net, {**drawn, "layer2.weight": 0.01 * drawn["layer2.weight"]})


def activation_named(norm: NormName) -> Callable[[Tensor], Tensor]:
    """Returns the rectifier, with the hidden units of an image normalised before it, after it or not at all.

    Raises:
        ExpectedFailure: if there is no such place.
    """

    def normalised(values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:])

    activations = {
        "none": torch.relu,
        "before": lambda values: torch.relu(normalised(values)),
        "after": lambda values: normalised(torch.relu(values)),
    }
    if norm not in activations:
        raise ExpectedFailure(f"`experiment.norm` is {norm!r}, which is no place. Use none, before or after.")
    return activations[norm]


class ChosenExamples(ht.InnerProblem):
    """Trains the classifier on the examples `chosen` of a pool, with `weights` if the problem's context has them.

    Args:
        net: the classifier.
        pool: the pool.
        batches: places among the chosen examples.
    """

    def __init__(self, net: MLP, pool: Pool, batches: ht.Minibatches) -> None:
        self._net = net
        self._pool = pool
        self._batches = batches

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights."""
        return self._net.draw(self._pool.inputs)

    def batch(self, step: int) -> Batch:
        """Returns places among the chosen examples."""
        return self._batches(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the mean of the cross-entropies, each times its weight."""
        chosen = hparams["chosen"][batch[0]]
        losses = F.cross_entropy(
            self._net(params, self._pool.inputs[chosen]), self._pool.labels[chosen], reduction="none"
        )
        return (losses * hparams["weights"][chosen]).mean() if "weights" in hparams else losses.mean()


def draw_selection(weights: Tensor, pool: Pool, where: str, path: Path) -> None:
    """Draws the weights of each kind of example, and the examples that weigh least.

    Args:
        weights: in (0, 1), shape `(examples,)`.
        pool: the examples.
        where: which these are.
        path: the picture.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.0, 1.3])[0]
    rows = left.subplots(len(KINDS), 1, sharex=True)
    for kind, (axes, name) in enumerate(zip(rows, KINDS, strict=True)):
        own = weights[pool.kinds == kind].cpu()
        axes.hist(own.numpy(), bins=np.linspace(0.0, 1.0, 41).tolist(), color=COLOURS[kind])
        axes.axvline(float(own.mean()), color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{name}: {len(own):,} examples, mean weight {float(own.mean()):.2f}", fontsize=10)
        axes.set_ylabel("examples")
    rows[-1].set_xlabel("learnt weight")
    left.suptitle(f"Learnt weights of {where}")
    right.suptitle("The examples that weigh least: label given (true label, -1: no digit)")
    order = weights.argsort(stable=True)[: _GRID[0] * _GRID[1]]
    draw_image_grid(right, _GRID, pool.inputs[order], pool.labels[order], pool.true[order])
    figure.savefig(path, dpi=100)
