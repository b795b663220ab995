"""A classifier of images: trained with a weight on the loss of each image, judged on images with true labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.data_sets.digits import CLASSES
from experiments.common.models.mlp import accuracy
from hypertorch.types import Batch, TensorDict, TensorMapping

Net: TypeAlias = Callable[[TensorMapping, Tensor], Tensor]
"""A classifier as a function of its params and of images: its outputs, shape `(images, classes)`."""


def logits(params: TensorMapping, inputs: Tensor) -> Tensor:
    """Returns the outputs of softmax regression, or of a net with one hidden layer; see `first_params`."""
    if "hidden.weight" in params:
        inputs = torch.tanh(F.linear(inputs, params["hidden.weight"], params["hidden.bias"]))
    return F.linear(inputs, params["output.weight"], params["output.bias"])


class WeightedImages(ht.InnerProblem):
    """Trains the classifier on labelled images: `L = mean_i v_i l_i + l2 |params|^2 / 2` with cross-entropies `l_i`.

    Args:
        data: inputs of shape `(images, pixels)`, labels as given, and who or what gave each, both of shape
            `(images,)`; or a function of the inner step that returns them.
        first: the first params.
        net: the classifier.
    """

    def __init__(
        self, *, data: tuple[Tensor, Tensor, Tensor] | Callable[[int], Batch], first: TensorDict, net: Net = logits
    ) -> None:
        self._data = data
        self._first = first
        self._net = net

    @abstractmethod
    def weights(self, hparams: TensorDict, losses: Tensor, source: Tensor) -> Tensor:
        """Returns the weights `v` of the images, of the shape of `losses` and `source`: `(images,)`."""

    @abstractmethod
    def l2(self, hparams: TensorDict) -> Tensor | float | None:
        """Returns the strength of the penalty; None for no penalty."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the first params, which are not learnt."""
        return dict(self._first)

    def batch(self, step: int) -> Batch:
        """Returns the images of a step."""
        return self._data(step) if callable(self._data) else self._data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the weighted cross-entropy and the penalty."""
        inputs, labels, source = batch
        losses = F.cross_entropy(self._net(params, inputs), labels, reduction="none")
        weighted = (self.weights(hparams, losses, source) * losses).mean()
        strength = self.l2(hparams)
        if strength is None:
            return weighted
        return weighted + strength * sum(value.square().sum() for value in params.values()) / 2


class CleanImages(ht.OuterProblem):
    """Judges the classifier on images whose labels are true.

    Args:
        data: inputs of shape `(images, pixels)` and labels of shape `(images,)`; or a function of the outer step that
            returns them.
        first: the outer variables before the first outer step.
        constraints: the sets that they are kept in, by name.
        figures: of the outer variables alone, reported beside the accuracy.
        others: further images and labels, by the name that the accuracy on them is reported under.
        net: the classifier.
        measures: what is reported of the answers, from outputs and labels, by name; None for the accuracy.
    """

    def __init__(
        self,
        *,
        data: tuple[Tensor, Tensor] | Callable[[int], Batch],
        first: TensorDict,
        constraints: Mapping[str, ht.Constraint] | None = None,
        figures: Callable[[TensorDict], TensorDict] | None = None,
        others: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        net: Net = logits,
        measures: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    ) -> None:
        self._data = data
        self._measures = measures or {"accuracy": accuracy}
        self._others = others or {}
        self._net = net
        self._first = first
        self._constraints = constraints or {}
        self._figures = figures

    def init_hparams(self) -> TensorDict:
        """Returns the outer variables before the first outer step."""
        return dict(self._first)

    def constraints(self) -> Mapping[str, ht.Constraint]:
        """Returns the sets that the outer variables are kept in."""
        return self._constraints

    def batch(self, outer_step: int) -> Batch:
        """Returns the images of an outer step."""
        return self._data(outer_step) if callable(self._data) else self._data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy."""
        inputs, labels = batch
        return F.cross_entropy(self._net(params, inputs), labels)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the measures, the accuracy on the other images, and the figures of the outer variables."""
        inputs, labels = batch
        outputs = self._net(params, inputs)
        found = {name: measure(outputs, labels) for name, measure in self._measures.items()}
        found |= {name: accuracy(self._net(params, inputs), labels) for name, (inputs, labels) in self._others.items()}
        return {**found, **(self._figures(hparams) if self._figures else {})}


def first_params(pixels: int, hidden: int, generator: torch.Generator, *, classes: int = CLASSES) -> TensorDict:
    """Returns first params of a classifier with one hidden layer, or of softmax regression, whose params start at 0.

    Args:
        pixels: of an image.
        hidden: width of the hidden layer; 0 for none.
        generator: of the first weights.
        classes: that it tells from each other.
    """
    if not hidden:
        return {"output.weight": torch.zeros(classes, pixels), "output.bias": torch.zeros(classes)}
    return {
        "hidden.weight": torch.randn(hidden, pixels, generator=generator) / pixels**0.5,
        "hidden.bias": torch.zeros(hidden),
        "output.weight": torch.randn(classes, hidden, generator=generator) / hidden**0.5,
        "output.bias": torch.zeros(classes),
    }
