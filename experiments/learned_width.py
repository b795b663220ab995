"""How large a net needs to be: widths, depth and a tie of weights, learnt by gradient descent at a price per unit.

scripts/train experiment=learned_width
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import cycle
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
from experiments.common.models.mlp import accuracy
from experiments.common.results.learning_curve import logged
from experiments.common.results.line_styles import COLOURS, MARKERS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline
from experiments.common.runs.seeds import Purpose
from hypertorch.types import Batch, TensorDict, TensorMapping

_STEEPNESS = 16.0  # gates fall from 0.9 to 0.1 over a quarter of a layer
_SURE = 50.0  # a logit whose sigmoid is 1 or, with a minus, 0


@dataclass(eq=False, repr=False, kw_only=True)
class LearnedWidth(DigitsExperiment):
    """Learns the size of several nets, side by side, each at its own price per unit.

    An outer step trains all nets from new first weights. The outer variables then follow the hypergradient of the
    validation loss plus the price of the units in use. On the test images, nets are judged that are cut where the gates
    and shares cross one half, and are trained anew for longer.

    Args:
        prices: of a unit, one for each net (unit: outer loss per unit).
        hard_widths: shares of each layer's units that the baselines keep, as many as there are prices.
        sizes: images for "train", "validation" and "test"; 0 for all that are left over.
        pool: side of the squares of pixels that become one pixel first (unit: pixels).
        channels: of the first layer, before any is cut.
        width: units of every other layer, before any is cut.
        num_blocks: blocks that can become the identity.
        batch_size: images in a minibatch of an inner step.
        num_steps: the horizon of an outer step (unit: inner steps).
        final_steps: the horizon of the final evaluation (unit: inner steps).
    """

    metric = "outer_loss"
    mode = "min"

    prices: Sequence[float]
    hard_widths: Sequence[float]
    pool: int = 1
    channels: int = 8
    width: int = 32
    num_blocks: int = 2
    batch_size: int = 100
    num_steps: int = 60
    final_steps: int = 600

    def __post_init__(self) -> None:
        if not all(0.0 <= price < float("inf") for price in self.prices):
            raise ExpectedFailure(
                f"`experiment.prices` is {list(self.prices)}: a unit costs something or nothing. Use numbers of "
                "at least 0."
            )
        if len(self.hard_widths) != len(self.prices) or not all(0.0 < share <= 1.0 for share in self.hard_widths):
            raise ExpectedFailure(
                f"`experiment.hard_widths` is {list(self.hard_widths)} for {len(self.prices)} prices: the baselines "
                "train as many nets as are learnt, each with a share of the units. Give as many numbers above 0, up to "
                "1."
            )
        images = self.digit_splits()
        self._images = {split: (pooled(found.inputs, self.pool), found.labels) for split, found in images.items()}
        # Each net is a row of the table: what is learnt at one price is compared with given widths.
        self._judged = {f"test at price {price:g}": net for net, price in enumerate(self.prices)}
        self.splits = ("validation", *self._judged)
        side = round(self._images["train"][0].shape[1] ** 0.5)
        self._nets = ElasticNets(
            num_nets=len(self.prices), side=side, channels=self.channels, width=self.width, num_blocks=self.num_blocks
        )  # fmt: skip
        self._prices = torch.tensor(list(self.prices), dtype=self.settings.dtype, device=self.settings.device)
        self._hard_widths = self._prices.new_tensor(list(self.hard_widths))
        self._dynamics: ht.Dynamics = build(self.config, "dynamics")

    def training(self) -> ht.ProblemSource:
        """Returns short runs of all nets from new first weights, judged on the validation images."""
        return self._runs("training", self._nets, num_steps=self.num_steps, shows_layers=True)

    def validation(self) -> ht.ProblemSource:
        """Returns the same with other first weights and minibatches."""
        return self._runs("validation", self._nets, num_steps=self.num_steps)

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns long runs: of all nets as they are learnt for "validation", else of the net of one price, cut."""
        nets = self._nets if split == "validation" else self._nets.cut(self._judged[split])
        return self._runs("evaluation", nets, num_steps=self.final_steps, seed=seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns nets of a given width with all their blocks, dense or convolutional at first, and without blocks."""
        if split == "validation":
            return {}
        source, widths = self.evaluation(split), self._hard_widths
        kinds = {
            "dense": self._nets.given(widths, convolution=-_SURE),
            "convolution": self._nets.given(widths, convolution=_SURE),
            "dense without blocks": self._nets.given(widths, convolution=-_SURE, blocks=-_SURE),
        }
        kept = float(widths[self._judged[split]])
        return {
            f"{kept:.3g} of the units, {kind}": Baseline(source=source, hparams=hparams)
            for kind, hparams in kinds.items()
        }

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws loss against size, and how widths and shares moved."""
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        draw_sizes(results, folder / "metrics.jsonl", list(self._judged), self._nets, folder / "sizes.png")

    def _runs(
        self,
        purpose: Purpose,
        nets: ElasticNets,
        *,
        num_steps: int,
        shows_layers: bool = False,
        seed: int | None = None,
    ) -> ht.ProblemSource:
        """Returns a run with first weights and minibatches of its own for every outer step; cut nets see the test."""
        train = TensorDataset(*self._images["train"])
        judged = self._images["test" if nets.is_cut else "validation"]

        def problem(own: int) -> ht.BilevelProblem:
            return ht.BilevelProblem(
                NetTraining(nets=nets, batches=ht.Minibatches(train, self.batch_size, seed=own)),
                PricedNets(nets=nets, data=judged, prices=self._prices, shows_layers=shows_layers),
                dynamics=self._dynamics,
                num_steps=num_steps,
                seed=own,
            )

        return self.reseeded(purpose, problem, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What the outer variables switch on: 1 for on, 0 for off, between them while they are learnt.

    Args:
        units: by layer, shape `(nets, units)`; of a block's hidden units, too.
        blocks: shape `(nets, blocks)`.
        convolution: shape `(nets,)`; the dense weights have the rest.
    """

    units: TensorDict
    blocks: Tensor
    convolution: Tensor

    def layer_units(self) -> TensorDict:
        """Returns how many units of each layer are in use, shape `(nets,)`; a block's count as far as it is on."""
        found = {layer: gates.sum(dim=1) for layer, gates in self.units.items()}
        blocks = {f"block{index + 1}": self.blocks[:, index] for index in range(self.blocks.shape[1])}
        return {layer: blocks[layer] * units if layer in blocks else units for layer, units in found.items()}

    def total(self) -> Tensor:
        """Returns how many units are in use, shape `(nets,)`."""
        return torch.stack(list(self.layer_units().values())).sum(dim=0)


class ElasticNets:
    """Nets of soft size, side by side.

    Gates `g` multiply units, shares `a` and `c` in (0, 1) multiply maps:

        h = g_0 relu((1 - c) dense(x) + c convolution(x) + b)      channels at every other pixel
        h = g_1 relu(W h + b)                                      the stream
        h = h + a_k g_1 V_k (g_k relu(U_k h + b))                  block k: the identity for a_k = 0
        output = O h + b

    The gate of unit `i` of `n` is `sigmoid(cutoff - 16 (i + 1/2) / n)`.

    Args:
        num_nets: how many nets.
        side: of the images (unit: pixels).
        channels: of the first layer.
        width: units of every other layer.
        num_blocks: how many blocks.
    """

    def __init__(self, *, num_nets: int, side: int, channels: int, width: int, num_blocks: int) -> None:
        self.is_cut, self._num_nets, self.chosen = False, num_nets, slice(None)
        self._side, self._positions = side, ((side + 1) // 2) ** 2
        self.blocks = [f"block{index + 1}" for index in range(num_blocks)]
        self.units = {"channels": channels, "stream": width, **dict.fromkeys(self.blocks, width)}
        inputs = self._positions * channels
        self._shapes = {
            "dense": (side**2, inputs),
            "convolution": (9, channels),
            "stream": (inputs, width),
            **{f"{block}.{end}": (width, width) for block in self.blocks for end in ("in", "out")},
            "output": (width, CLASSES),
        }
        self._biases = {"channels": channels, "stream": width, **dict.fromkeys(self.blocks, width), "output": CLASSES}

    def cut(self, net: int) -> ElasticNets:
        """Returns one net alone, whose gates and shares are 0 or 1: what is below one half is gone."""
        found = copy(self)
        found.is_cut, found._num_nets, found.chosen = True, 1, slice(net, net + 1)
        return found

    def init_params(self, like: Tensor) -> TensorDict:
        """Returns first weights from torch's default generator, the same for all nets; biases of 0.

        Args:
            like: a tensor of their dtype and device.
        """
        drawn = {
            name: torch.randn(shape, dtype=like.dtype, device=like.device) * (2.0 / shape[0]) ** 0.5
            for name, shape in self._shapes.items()
        }
        biases = {f"{name}.bias": like.new_zeros(1, size) for name, size in self._biases.items()}
        return {name: value.repeat(self._num_nets, 1, 1) for name, value in {**drawn, **biases}.items()}

    def given(self, shares: Tensor, *, convolution: float, blocks: float = _SURE) -> TensorDict:
        """Returns outer variables of nets with given shares of each layer's units.

        Args:
            shares: one for each net that is learnt, shape `(nets,)`.
            convolution: logit of the convolution's share in the first layer.
            blocks: logit of how far every block is on.
        """
        return {
            **{f"{layer}.cutoff": _STEEPNESS * shares for layer in self.units},
            "blocks": shares.new_full((len(shares), len(self.blocks)), blocks),
            "convolution": torch.full_like(shares, convolution),
        }

    def gates(self, hparams: TensorMapping) -> Gates:
        """Returns the gates of the nets, of 0 and 1 alone if they are cut."""

        def switch(logit: Tensor) -> Tensor:
            return (logit > 0).to(logit.dtype) if self.is_cut else logit.sigmoid()

        own = {name: value[self.chosen] for name, value in hparams.items()}
        units = {}
        for layer, size in self.units.items():
            cutoff = own[f"{layer}.cutoff"]
            place = (torch.arange(size, dtype=cutoff.dtype, device=cutoff.device) + 0.5) / size
            units[layer] = switch(cutoff[:, None] - _STEEPNESS * place)
        return Gates(units=units, blocks=switch(own["blocks"]), convolution=switch(own["convolution"]))

    def __call__(self, params: TensorMapping, gates: Gates, images: Tensor) -> Tensor:
        """Returns the outputs, shape `(nets, images, classes)`, of images of shape `(images, pixels)`."""
        square = images.reshape(-1, 1, self._side, self._side)
        patches = F.unfold(square, 3, padding=1, stride=2).mT.reshape(1, -1, 9)
        shape = (self._num_nets, len(images), self._positions, -1)
        share = gates.convolution[:, None, None, None]
        dense = (images @ params["dense"]).reshape(shape)
        convolved = (patches @ params["convolution"]).reshape(shape)
        mixed = (1 - share) * dense + share * convolved + params["channels.bias"][:, None]
        hidden = (mixed.relu() * gates.units["channels"][:, None, None]).flatten(2)
        stream = torch.baddbmm(params["stream.bias"], hidden, params["stream"]).relu() * gates.units["stream"][:, None]
        for index, block in enumerate(self.blocks):
            inner = torch.baddbmm(params[f"{block}.bias"], stream, params[f"{block}.in"]).relu()
            added = (inner * gates.units[block][:, None]) @ params[f"{block}.out"]
            stream = stream + gates.blocks[:, index, None, None] * gates.units["stream"][:, None] * added
        return torch.baddbmm(params["output.bias"], stream, params["output"])


class NetTraining(ht.InnerProblem):
    """Trains the nets side by side, on the same minibatches.

    Args:
        nets: the nets.
        batches: images and labels of an inner step.
    """

    def __init__(self, *, nets: ElasticNets, batches: ht.Minibatches) -> None:
        self._nets, self._batches = nets, batches

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights, the same for all nets."""
        return self._nets.init_params(hparams["convolution"])

    def batch(self, step: int) -> Batch:
        """Returns images and labels."""
        return self._batches(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the sum of the nets' cross-entropies: each is trained as it would be alone."""
        images, labels = batch
        return cross_entropies(self._nets(params, self._nets.gates(hparams), images), labels).sum()


class PricedNets(ht.OuterProblem):
    """Judges each net by its loss on held-out images, and by the price of its units.

    Args:
        nets: the nets.
        data: images and labels.
        prices: of a unit, of every net that is learnt, shape `(nets,)`.
        shows_layers: whether to report the units of each layer and the shares of blocks and convolution, by net.
    """

    def __init__(
        self, *, nets: ElasticNets, data: tuple[Tensor, Tensor], prices: Tensor, shows_layers: bool = False
    ) -> None:
        self._nets, self._data, self._prices, self._shows_layers = nets, data, prices, shows_layers

    def init_hparams(self) -> TensorDict:
        """Returns the largest widths, blocks that are on by three quarters, and a first layer that is half dense."""
        return self._nets.given(torch.ones_like(self._prices), convolution=0.0, blocks=math.log(3.0))

    def constraints(self) -> Mapping[str, ht.Constraint]:
        """Returns that no layer has fewer than 0 units, or more than it was made with."""
        return {"*.cutoff": ht.Box(lower=0.0, upper=_STEEPNESS)}

    def batch(self, outer_step: int) -> Batch:
        """Returns images and labels."""
        return self._data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the mean over nets of the cross-entropy plus the price of the units in use."""
        gates, (images, labels) = self._nets.gates(hparams), batch
        losses = cross_entropies(self._nets(params, gates, images), labels)
        return (losses + self._prices[self._nets.chosen] * gates.total()).mean()

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns accuracy, cross-entropy and units, as means over nets, and if asked for, each net's parts."""
        gates, (images, labels) = self._nets.gates(hparams), batch
        outputs = self._nets(params, gates, images)
        found = {
            "accuracy": accuracy(outputs, labels),
            "loss": cross_entropies(outputs, labels).mean(),
            "units": gates.total().mean(),
        }
        if self._shows_layers:
            for part, values in {**gates.layer_units(), "convolution": gates.convolution}.items():
                found |= {f"net{net + 1}_{part}": value for net, value in enumerate(values)}
        return found


def cross_entropies(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns each net's mean cross-entropy, shape `(nets,)`."""
    losses = F.cross_entropy(outputs.flatten(0, 1), labels.repeat(len(outputs)), reduction="none")
    return losses.reshape(len(outputs), -1).mean(dim=1)


def pooled(images: Tensor, pool: int) -> Tensor:
    """Returns flattened square images, of which squares of `pool x pool` pixels became one."""
    side = round(images.shape[1] ** 0.5)
    if pool < 1 or side % pool:
        raise ExpectedFailure(
            f"`experiment.pool` is {pool}, but the images have {side} pixels a side: squares of that side do not "
            "fill them. Give a divisor; 1 leaves the images as they are."
        )
    return F.avg_pool2d(images.reshape(-1, 1, side, side), pool).flatten(1)


def draw_sizes(
    results: Mapping[str, Mapping], metrics: Path, names: Sequence[str], nets: ElasticNets, path: Path
) -> None:
    """Draws loss against size, and the units in use and the convolution's share over the outer steps.

    Args:
        results: the contents of the run's results.json.
        metrics: the run's metrics.jsonl.
        names: of the nets, which are those of the splits that they are judged on.
        nets: the nets.
        path: the picture.
    """
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 1.5))[0]
    against = left.subplots()
    learnt = {net: results["metrics"][name] for net, name in enumerate(names) if name in results["metrics"]}
    # One curve for each kind of baseline, whose name ends in it.
    curves: dict[str, list[Mapping]] = {}
    for name, splits in results["baselines"].items():
        curves.setdefault(f"given widths, {name.split(', ')[-1]}", []).extend(splits.values())
    styles = zip(MARKERS[1:], ("-", "--", ":"), strict=False)
    for (label, judged), (marker, dashes) in zip(curves.items(), styles, strict=False):
        against.plot(*_places(judged), marker=marker, linestyle=dashes, color="0.55", markersize=7, label=label)
    against.plot(*_places(learnt.values()), color="black", zorder=2, label="learnt, cut and trained anew (by price)")
    for net, judged in learnt.items():
        against.plot(*_places([judged]), "o", color=COLOURS[net % len(COLOURS)], markersize=11, zorder=3)
    against.set(xlabel="units in use", ylabel="cross-entropy on test images", title="Loss against size")
    against.set_ylim(bottom=0.0)
    against.legend(frameon=False)
    parts = {layer: f"units of {layer.replace('block', 'block ')}" for layer in nets.units}
    parts |= {
        "channels": "channels of the first layer",
        "stream": "units of the stream",
        "convolution": "share of the convolution",
    }
    # One place more than there are parts: for the legend.
    cells = list(right.subplots(2, len(parts) // 2 + 1, squeeze=False, sharex=True).flat)
    for cell, (part, title) in zip(cells, parts.items(), strict=False):
        for net, (name, colour) in enumerate(zip(names, cycle(COLOURS), strict=False)):
            cell.plot(*logged(metrics, f"net{net + 1}_{part}"), color=colour, linewidth=1.8, label=name)
        cell.set_title(title)
        cell.set_ylim(0.0, 1.05 * nets.units.get(part, 1))
    for cell in cells[len(parts) :]:
        cell.set_axis_off()
    right.supxlabel("outer step", fontsize=10)
    handles, labels = cells[0].get_legend_handles_labels()
    cells[-1].legend(handles, [label.removeprefix("test at ") for label in labels], frameon=False, loc="center")
    for axes in (against, *cells):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=100)


def _places(judged: Iterable[Mapping]) -> tuple[list[float], list[float]]:
    """Returns units and losses, from the smallest net to the largest."""
    points = sorted((figures["units"]["mean"], figures["loss"]["mean"]) for figures in judged)
    return [units for units, _ in points], [loss for _, loss in points]
