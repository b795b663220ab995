"""An optimiser that is learnt: a small network computes the step of every weight of a net.

scripts/train experiment=learned_optimizer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.data_sets.digits import CLASSES
from experiments.common.diagnostics.settings_grid import Axis, grid_problem
from experiments.common.models.labelled_images import CleanImages
from experiments.common.models.mlp import MLP, accuracy
from experiments.common.models.net_training import NetTraining
from experiments.common.results.line_styles import line_styles
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline
from experiments.common.runs.seeds import Purpose
from hypertorch.types import Batch, TensorDict

# What the optimisers that are written by hand are tuned over; from one rate to the next it is a factor 10 ** (1 / 6).
_RATES = Axis(name="lr", start=1e-3, stop=10.0, scale="log")
_NUM_RATES = 25
_DECAYS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
_CURVES = 10  # nets in the picture
_TOGETHER = ht.Execution(tasks="vmap")
# Of the images that the net is trained on, after its last step.
_MEASURES = {"training_loss": F.cross_entropy, "accuracy": accuracy}


@dataclass(frozen=True, kw_only=True)
class HandWritten:
    """An optimiser with settings to tune.

    Args:
        dynamics: the optimiser; it reads `lr` and `decay` of the outer variables.
        decays: of its running mean of gradients, to choose from.
    """

    dynamics: ht.Dynamics
    decays: tuple[float, ...]


_ADAM = ht.dynamics.Adam(lr=ht.Hyper("lr"), beta1=ht.Hyper("decay"))
_HAND_WRITTEN = {
    "Adam, rate and decay tuned": HandWritten(dynamics=_ADAM, decays=_DECAYS),
    "Adam, rate tuned": HandWritten(dynamics=_ADAM, decays=(0.9,)),
    "momentum, rate and decay tuned": HandWritten(
        dynamics=ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=ht.Hyper("decay")), decays=_DECAYS
    ),
    "SGD, rate tuned": HandWritten(dynamics=ht.dynamics.SGD(lr=ht.Hyper("lr")), decays=(0.0,)),
}


_DRAWN = ("Adam, rate and decay tuned", "momentum, rate and decay tuned", "SGD, rate tuned")


@dataclass(eq=False, repr=False, kw_only=True)
class LearnedOptimizer(DigitsExperiment):
    """Learns the update rule that trains a small net, so that its training loss is least after some steps.

    The rule is a network that sees the gradient of one weight at a time, with a memory of its own for each. Every outer
    step trains a net from new first weights on new minibatches. The nets of the final evaluation have fresh seeds, and
    those of the test are trained on images that the rule was not learnt on, for as many steps and for twice as many.

    Args:
        config: the configuration; `dynamics` is the rule.
        sizes: images for "train", "validation" and "test", on each of which nets are trained; 0 for all left over.
        hidden: widths of the hidden layers of the nets.
        batch_size: images in a minibatch of an inner step.
        outer_batch_size: training images that the loss of an outer step is taken on.
        num_steps: the horizon (unit: inner steps).
        search_seeds: nets that each setting of Adam, momentum and SGD is judged on.
    """

    splits = ("validation", "test_twice_as_long", "test")
    metric = "training_loss"
    mode = "min"

    hidden: list[int]
    batch_size: int = 64
    outer_batch_size: int = 200
    num_steps: int = 40
    search_seeds: int = 5

    def __post_init__(self) -> None:
        self.images = self.digit_splits()
        self._net = MLP((self.images["train"].inputs.shape[1], *self.hidden, CLASSES))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self._rule = build(self.config, "dynamics")
        if not isinstance(self._rule, ht.dynamics.LearnedUpdate):
            raise ExpectedFailure(
                f"`dynamics` is {type(self._rule).__name__}, which has no update rule to learn. Write "
                "dynamics=learned_update or dynamics=learned_update_mlp."
            )
        self._rule.rule.to(self.settings.device, self.settings.dtype)
        self._tuned = cache(self._tune)

    def training(self) -> ht.ProblemSource:
        """Returns a net with new first weights for every outer step."""
        images = TensorDataset(*self.images["train"].pairs())
        judged = ht.Minibatches(images, self.outer_batch_size, seed=self.settings.seed)
        return self._nets("training", "train", self._rule, judged=judged)

    def validation(self) -> ht.ProblemSource:
        """Returns nets with other seeds, trained on other images."""
        return self._nets("validation", "validation", self._rule)

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns nets with fresh seeds, trained on the images of a split."""
        return self._judged(split, self._rule, seed=seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns Adam, momentum and SGD, each with the settings that are best on validation at the same horizon."""
        num_steps = self._horizon(split)
        return {
            name: Baseline(source=self._judged(split, own.dynamics), hparams=self._tuned(name, num_steps))
            for name, own in _HAND_WRITTEN.items()
        }

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws how the loss of fresh nets falls with each optimiser."""
        chosen = {"learnt rule": (self._rule, hparams)}
        for name in _DRAWN:
            own, found = _HAND_WRITTEN[name], self._tuned(name, self.num_steps)
            decay = f", decay {float(found['decay']):g}" if float(found["decay"]) else ""
            label = f"{name.split(',')[0]} (rate {float(found['lr']):.2g}{decay})"
            chosen[label] = own.dynamics, found
        curves = {label: self._curves(dynamics, values) for label, (dynamics, values) in chosen.items()}
        draw_curves(curves, self.num_steps, folder / "training_curves.png")

    def _horizon(self, split: str) -> int:
        return self.num_steps * (2 if split.endswith("twice_as_long") else 1)

    def _judged(self, split: str, dynamics: ht.Dynamics, *, seed: int | None = None) -> ht.ProblemSource:
        images = "test" if split.startswith("test") else split
        return self._nets("evaluation", images, dynamics, num_steps=self._horizon(split), seed=seed)

    def _nets(
        self,
        purpose: Purpose,
        split: str,
        dynamics: ht.Dynamics,
        *,
        judged: Callable[[int], Batch] | None = None,
        num_steps: int | None = None,
        seed: int | None = None,
    ) -> ht.ProblemSource:
        """Returns nets with first weights and minibatches of their own, trained and judged on the images of a split."""
        images = self.images[split]
        data = TensorDataset(*images.pairs())
        first = {} if dynamics is self._rule else {name: images.inputs.new_tensor(0.0) for name in ("lr", "decay")}
        judged = (lambda _: images.pairs()) if judged is None else judged
        outer = CleanImages(data=judged, first=first, net=self._net, measures=_MEASURES)

        def problem(own: int) -> ht.BilevelProblem:
            inner = NetTraining(
                net=self._net, batches=ht.Minibatches(data, self.batch_size, seed=own), like=images.inputs
            )
            steps = self.num_steps if num_steps is None else num_steps
            return ht.BilevelProblem(inner, outer, dynamics=dynamics, num_steps=steps, seed=own)

        return self.reseeded(purpose, problem, seed=seed)

    def _tune(self, name: str, num_steps: int) -> TensorDict:
        """Returns the settings of an optimiser with which the nets of validation have the least loss at a horizon."""
        own = _HAND_WRITTEN[name]
        source = self._nets("validation", "validation", own.dynamics, num_steps=num_steps)
        like = self.images["validation"].inputs
        decays = Axis(name="decay", start=min(own.decays), stop=max(own.decays), scale="linear")
        rates = _RATES.coordinates(_NUM_RATES, like)
        points = torch.cartesian_prod(rates, like.new_tensor(own.decays)).T
        grid = {"grid.x": points[0], "grid.y": points[1]}
        # All settings at once: each is a task of one problem.
        losses = [
            ht.unroll(grid_problem(source.at(net), (_RATES, decays), grid), grid, execution=_TOGETHER).outer_loss
            for net in range(self.search_seeds)
        ]
        rate, decay = points[:, torch.stack(losses).mean(dim=0).nan_to_num(torch.inf).argmin()]
        return {"lr": _RATES.values(rate), "decay": decay}

    def _curves(self, dynamics: ht.Dynamics, hparams: TensorDict) -> Tensor:
        """Returns the loss of fresh nets after 0, 1, ... steps, shape `(nets, 2 * num_steps + 1)`."""
        source = self._judged("test_twice_as_long", dynamics)
        after = range(2 * self.num_steps + 1)
        runs = (ht.unroll(source.at(net), hparams, outer_step=net, metrics_after=after) for net in range(_CURVES))
        return torch.stack([run.metrics_after[self.metric] for run in runs])


def draw_curves(curves: Mapping[str, Tensor], num_steps: int, path: Path) -> None:
    """Draws the mean and the middle half of losses over the inner steps.

    Args:
        curves: by optimiser, the first the learnt one; shape `(nets, steps + 1)`.
        num_steps: the horizon that was learnt on (unit: inner steps).
        path: the picture.
    """
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for label, style in line_styles(curves).items():
        losses = curves[label].cpu()
        steps = range(losses.shape[1])
        low, high = losses.quantile(losses.new_tensor([0.25, 0.75]), dim=0)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
        mark = {"markevery": max(1, len(steps) // 16), "markersize": 7}
        axes.plot(steps, losses.mean(dim=0), label=label, **{**style, **mark})
    axes.axvline(num_steps, color="black", linestyle=":", linewidth=1)
    axes.annotate(
        "the rule is learnt, and the others are\ntuned, for this number of steps",
        (num_steps, 1),
        (5, -5),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        fontsize=9,
    )
    axes.set(xlabel="inner step", ylabel="cross-entropy on all training images", yscale="log")
    axes.set_title(f"Mean and middle half of {len(losses)} fresh nets", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=110)
