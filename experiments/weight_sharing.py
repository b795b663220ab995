"""How much alphabets share: nets whose weights are mixed by learnt matrices, one for each layer.

scripts/train experiment=weight_sharing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.settings import ProblemSettings
from experiments.common.data_sets.alphabets import AlphabetsName, load_alphabets
from experiments.common.runs.experiment import Baseline, Experiment
from experiments.common.runs.seeds import Purpose
from hypertorch.types import Batch, TensorDict


class WeightSharing(Experiment):
    """Learns how much the nets of several alphabets share in each layer.

    Alphabet `t` has the weights `w_t = sum_s M[t, s] z_s`, with a matrix `M` for each layer (outer variables) and
    weights `z` of every alphabet (inner variables), all of which start alike. The identity stands for nets that share
    nothing, equal numbers for one layer that serves all. Each outer step draws anew which drawings train and which
    validate; the final training has them all, and is judged on drawings that no outer step saw.

    Args:
        config: the configuration, for the group `dynamics`.
        settings: the plain settings of all experiments.
        data: "strokes" (embedded) or "omniglot".
        root: Omniglot's folder.
        num_alphabets: how many; each is there a second time, turned by 90 degrees.
        num_characters: of an alphabet.
        num_training: drawings of a character that train in an outer step.
        num_validation: drawings of a character that validate in an outer step.
        num_test: drawings of a character for the test.
        image_size: height and width (unit: pixels).
        hidden: widths of the hidden layers.
        num_steps: the horizon (unit: steps).
        l2: strength of the penalty on the weights.
    """

    READS: ClassVar = Reads(blocks=("dynamics",))
    splits = ("validation", "test")
    metric = "outer_loss"
    mode = "min"
    published: ClassVar = {
        "test loss (Maclaurin et al. 2015, from the authors' logs; larger nets and alphabets)": "learnt 1.13, lowest "
        "layer tied 1.25, separate 1.34",
    }

    def __init__(
        self,
        config: DictConfig,
        settings: ProblemSettings,
        *,
        data: AlphabetsName = "strokes",
        root: str | None = None,
        num_alphabets: int = 5,
        num_characters: int = 20,
        num_training: int = 10,
        num_validation: int = 2,
        num_test: int = 3,
        image_size: int = 14,
        hidden: Sequence[int] = (100, 50),
        num_steps: int = 50,
        l2: float = 1e-3,
    ) -> None:
        super().__init__(config, settings)
        if min(num_training, num_validation, num_test) < 1:
            raise ExpectedFailure(
                f"`experiment.num_training`, `num_validation` and `num_test` are {num_training}, {num_validation} and "
                f"{num_test}: each set needs a drawing of every character. Give at least 1."
            )
        found = load_alphabets(
            data,
            root=root,
            num_alphabets=num_alphabets,
            num_characters=num_characters,
            num_drawings=num_training + num_validation + num_test,
            image_size=image_size,
            seed=settings.seed,
        )
        images = found.images.to(device=settings.device, dtype=settings.dtype)
        self.names = found.names
        # The drawings that no outer step sees come last.
        self.learning, self.test = images.split([num_training + num_validation, num_test], dim=2)
        self._num_training, self._num_steps, self._l2 = num_training, num_steps, l2
        self._dynamics: ht.Dynamics = build(config, "dynamics")
        self._nets = MixedNets((image_size**2, *hidden, num_characters), len(self.names))

    def training(self) -> ht.ProblemSource:
        """Returns runs with drawings and first weights of their own for every outer step."""
        return self._redrawn("training")

    def validation(self) -> ht.ProblemSource:
        """Returns the same with other draws."""
        return self._redrawn("validation")

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns redrawn runs for "validation"; for "test", runs on all other drawings, from new first weights."""
        if split == "validation":
            return self._redrawn("evaluation", seed=seed)
        data = labelled(self.learning), labelled(self.test)
        return self.reseeded("evaluation", lambda own: self._problem(*data, own), seed=seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns nets that share nothing, that share the lowest layer, that share all, and the start of the search."""
        lowest = self._nets.layers[0]
        source, like = self.evaluation(split), self.learning
        shares = {
            "separate": dict.fromkeys(self._nets.layers, 0.0),
            "lowest layer tied": {layer: float(layer == lowest) for layer in self._nets.layers},
            "all layers tied": dict.fromkeys(self._nets.layers, 1.0),
            "half and half, as at the start": dict.fromkeys(self._nets.layers, 0.5),
        }
        return {
            name: Baseline(source=source, hparams=self._nets.mixing(own, like)) for name, own in shares.items()
        }  # fmt: skip

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the matrix of each layer."""
        draw_matrices(
            {name: value.detach().cpu() for name, value in hparams.items()}, self.names, folder / "mixing.png"
        )

    def _redrawn(self, purpose: Purpose, *, seed: int | None = None) -> ht.ProblemSource:
        def problem(own: int) -> ht.BilevelProblem:
            generator = torch.Generator().manual_seed(own)
            order = torch.randperm(self.learning.shape[2], generator=generator).to(self.learning.device)
            train, held_out = order[: self._num_training], order[self._num_training :]
            return self._problem(labelled(self.learning[:, :, train]), labelled(self.learning[:, :, held_out]), own)

        return self.reseeded(purpose, problem, seed=seed)

    def _problem(self, train: Batch, judged: Batch, seed: int) -> ht.BilevelProblem:
        first = self._nets.mixing(dict.fromkeys(self._nets.layers, 0.5), self.learning)
        return ht.BilevelProblem(
            AlphabetTraining(nets=self._nets, data=train, l2=self._l2),
            HeldOutDrawings(nets=self._nets, data=judged, first=first),
            dynamics=self._dynamics,
            num_steps=self._num_steps,
            seed=seed,
        )


class MixedNets:
    """Fully connected nets with one hidden nonlinearity, tanh, whose weights are mixed layer by layer.

    Args:
        widths: of inputs, hidden layers and outputs.
        num_nets: how many nets.
    """

    def __init__(self, widths: Sequence[int], num_nets: int) -> None:
        self._shapes = list(pairwise(widths))
        self._num_nets = num_nets
        self.layers = [f"layer{index + 1}" for index in range(len(self._shapes))]

    def draw(self, like: Tensor) -> TensorDict:
        """Returns first weights, the same for all nets, of shape `(nets, inputs + 1, outputs)`: the bias comes last."""
        params: TensorDict = {}
        for layer, (fan_in, fan_out) in zip(self.layers, self._shapes, strict=True):
            weights = torch.randn(fan_in, fan_out, dtype=like.dtype, device=like.device) / fan_in**0.5
            one = torch.cat([weights, weights.new_zeros(1, fan_out)])
            params[layer] = one.expand(self._num_nets, -1, -1).clone()
        return params

    def mixing(self, shares: Mapping[str, float], like: Tensor) -> TensorDict:
        """Returns matrices whose rows sum to 1: what is shared comes from all alike, the rest from the net itself.

        Args:
            shares: how much is shared, in [0, 1], by layer.
            like: a tensor of their dtype and device.
        """
        identity = torch.eye(self._num_nets, dtype=like.dtype, device=like.device)
        return {f"{layer}.mixing": (1 - share) * identity + share / self._num_nets for layer, share in shares.items()}

    def __call__(self, params: TensorDict, hparams: TensorDict, inputs: Tensor) -> Tensor:
        """Returns the outputs, shape `(nets, images, outputs)`, of inputs of shape `(nets, images, pixels)`."""
        for layer in self.layers:
            weights = torch.einsum("ts,sio->tio", hparams[f"{layer}.mixing"], params[layer])
            inputs = torch.baddbmm(weights[:, -1:], inputs, weights[:, :-1])
            inputs = inputs if layer == self.layers[-1] else inputs.tanh()
        return inputs


class AlphabetTraining(ht.InnerProblem):
    """Trains the nets, each on its own alphabet.

    Args:
        nets: the nets.
        data: drawings, shape `(nets, images, pixels)`, and labels, shape `(nets, images)`.
        l2: strength of the penalty.
    """

    def __init__(self, *, nets: MixedNets, data: Batch, l2: float) -> None:
        self._nets, self._data, self._l2 = nets, data, l2

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights, the same for all nets."""
        return self._nets.draw(next(iter(hparams.values())))

    def batch(self, step: int) -> Batch:
        """Returns all drawings and labels."""
        return self._data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the sum over nets of their cross-entropies, so that the step size does not depend on their number."""
        inputs, labels = batch
        penalty = torch.stack([weights.square().sum() for weights in params.values()]).sum()
        return len(labels) * cross_entropy(self._nets(params, hparams, inputs), labels) + self._l2 * penalty


class HeldOutDrawings(ht.OuterProblem):
    """Judges the nets on drawings that they were not trained on.

    Args:
        nets: the nets.
        data: drawings and labels, as for training.
        first: the matrices before the first outer step.
    """

    def __init__(self, *, nets: MixedNets, data: Batch, first: TensorDict) -> None:
        self._nets, self._data, self._first = nets, data, first

    def init_hparams(self) -> TensorDict:
        """Returns a matrix for each layer, shape `(nets, nets)`."""
        return self._first

    def batch(self, outer_step: int) -> Batch:
        """Returns drawings and labels."""
        return self._data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the mean cross-entropy."""
        inputs, labels = batch
        return cross_entropy(self._nets(params, hparams, inputs), labels)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the accuracy, mean over alphabets."""
        inputs, labels = batch
        outputs = self._nets(params, hparams, inputs)
        return {"accuracy": (outputs.argmax(dim=-1) == labels).to(outputs.dtype).mean()}


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy over nets and images."""
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def labelled(images: Tensor) -> Batch:
    """Returns drawings, shape `(nets, images, pixels)`, and their characters, shape `(nets, images)`.

    Args:
        images: shape `(nets, characters, drawings, pixels)`.
    """
    nets, characters, drawings, _ = images.shape
    labels = torch.arange(characters, device=images.device).repeat_interleave(drawings)
    return images.flatten(1, 2), labels.expand(nets, -1)


def draw_matrices(matrices: TensorDict, names: Sequence[str], path: Path) -> None:
    """Draws the matrix of each layer as a heat map, with one colour scale.

    Args:
        matrices: shape `(alphabets, alphabets)`, by layer, lowest first.
        names: of the alphabets.
        path: the picture.
    """
    figure = Figure(figsize=(3.6 * len(matrices) + 3.4, 6.4), layout="constrained")
    bound = max(float(matrix.abs().max()) for matrix in matrices.values())
    cells = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (name, matrix) in zip(cells, matrices.items(), strict=True):
        shown = axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
        axes.set_title(name.removesuffix(".mixing").replace("layer", "layer "))
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names if axes is cells[0] else [], fontsize=8)
    cells[0].set_ylabel("weights of")
    figure.supxlabel("are made of the weights of", fontsize=10)
    figure.colorbar(shown, ax=cells, shrink=0.75, label="share")
    figure.savefig(path, dpi=100)
