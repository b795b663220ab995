"""Which labellers to trust: data hyper-cleaning on scikit-learn's scanned digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.types import Batch, TensorDict

_CLASSES = 10
_PIXELS = 64
_DARKEST = 16.0


def noisy_digits(
    *,
    dynamics: ht.Dynamics,
    num_steps: int,
    num_labellers: int = 20,
    scans_each: int = 25,
    num_validation: int = 500,
    most_wrong: float = 0.9,
    hidden: int = 0,
    log_l2: float = -4.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> ht.BilevelProblem:
    """Returns the problem of weighting labellers, some of whom guess, so that a classifier does well on clean scans.

    Labeller `k` of `n` replaces a label by a random one with probability `most_wrong * k / (n - 1)`. The inner problem
    trains a classifier on all labelled scans, each weighted by `sigmoid(trust[k])` of its labeller, with an L2 penalty
    of `exp(log_l2)`. The outer problem judges it on scans with true labels. The data are real: 1797 scans of 8 x 8
    pixels.

    Args:
        dynamics: the inner optimiser.
        num_steps: the horizon (unit: steps).
        num_labellers: how many there are.
        scans_each: scans that each has labelled.
        num_validation: scans with true labels, by which the net is judged.
        most_wrong: share of random labels of the worst labeller.
        hidden: width of the classifier's hidden layer; 0 for softmax regression, whose inner problem is strongly
            convex.
        log_l2: logarithm of the penalty before the first outer step.
        seed: of the choice of scans, of the wrong labels and of the first weights.
        device: where the tensors are.
        dtype: of the tensors.

    Raises:
        ValueError: if there are not as many scans.

    References:
        Franceschi, Donini, Frasconi and Pontil (2017), Forward and reverse gradient-based hyperparameter optimization,
        section 5.1 (there with a weight for each example of MNIST).
    """
    num_training = num_labellers * scans_each
    pixels, digits = load_digits(return_X_y=True)
    if num_training + num_validation > len(digits):
        raise ValueError(
            f"`num_labellers * scans_each + num_validation` is {num_training + num_validation}, but there are "
            f"{len(digits)} scans. Lower one of them."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    inputs = torch.as_tensor(pixels / _DARKEST).to(dtype)[order]
    labels = torch.as_tensor(digits).long()[order]
    labeller = torch.arange(num_training) // scans_each
    wrong_share = most_wrong * labeller / max(num_labellers - 1, 1)
    is_wrong = torch.rand(num_training, generator=generator) < wrong_share
    guesses = torch.randint(_CLASSES, (num_training,), generator=generator)
    given = torch.where(is_wrong, guesses, labels[:num_training])
    held_out = slice(num_training, num_training + num_validation)
    return ht.BilevelProblem(
        LabelledScans(
            inputs=inputs[:num_training].to(device),
            labels=given.to(device),
            labeller=labeller.to(device),
            first={name: value.to(device, dtype) for name, value in _first_weights(hidden, generator).items()},
        ),
        CleanScans(
            inputs=inputs[held_out].to(device),
            labels=labels[held_out].to(device),
            first={
                "trust": torch.zeros(num_labellers, device=device, dtype=dtype),
                "log_l2": torch.tensor(log_l2, device=device, dtype=dtype),
            },
        ),
        dynamics=dynamics,
        num_steps=num_steps,
        seed=seed,
    )


def _first_weights(hidden: int, generator: torch.Generator) -> TensorDict:
    if not hidden:
        return {"output.weight": torch.zeros(_CLASSES, _PIXELS), "output.bias": torch.zeros(_CLASSES)}
    return {
        "hidden.weight": torch.randn(hidden, _PIXELS, generator=generator) / _PIXELS**0.5,
        "hidden.bias": torch.zeros(hidden),
        "output.weight": torch.randn(_CLASSES, hidden, generator=generator) / hidden**0.5,
        "output.bias": torch.zeros(_CLASSES),
    }


class LabelledScans(ht.InnerProblem):
    """Trains the classifier on what the labellers say, each as far as trusted.

    Args:
        inputs: shape `(scans, pixels)`.
        labels: as given, shape `(scans,)`.
        labeller: who gave them, shape `(scans,)`.
        first: the first weights.
    """

    def __init__(self, *, inputs: Tensor, labels: Tensor, labeller: Tensor, first: TensorDict) -> None:
        self._data = (inputs, labels, labeller)
        self._first = first

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the first weights, which are not learnt."""
        return dict(self._first)

    def batch(self, step: int) -> Batch:
        """Returns all labelled scans, at every step."""
        return self._data

    def full_batch(self) -> Batch:
        """Returns all labelled scans."""
        return self._data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the weighted cross-entropy and the penalty."""
        inputs, labels, labeller = batch
        losses = F.cross_entropy(logits(params, inputs), labels, reduction="none")
        penalty = sum(value.square().sum() for value in params.values()) / 2
        return (hparams["trust"].sigmoid()[labeller] * losses).mean() + hparams["log_l2"].exp() * penalty


class CleanScans(ht.OuterProblem):
    """Judges the classifier on scans whose labels are true.

    Args:
        inputs: shape `(scans, pixels)`.
        labels: shape `(scans,)`.
        first: the outer variables before the first outer step.
    """

    def __init__(self, *, inputs: Tensor, labels: Tensor, first: TensorDict) -> None:
        self._data = (inputs, labels)
        self._first = first

    def init_hparams(self) -> TensorDict:
        """Returns the trust in each labeller, before its sigmoid, and the logarithm of the penalty."""
        return dict(self._first)

    def batch(self, outer_step: int) -> Batch:
        """Returns all clean scans."""
        return self._data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy."""
        inputs, labels = batch
        return F.cross_entropy(logits(params, inputs), labels)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the accuracy."""
        inputs, labels = batch
        return {"accuracy": (logits(params, inputs).argmax(dim=-1) == labels).to(inputs.dtype).mean()}


def logits(params: TensorDict, inputs: Tensor) -> Tensor:
    """Returns the classifier's outputs, shape `(scans, classes)`."""
    if "hidden.weight" in params:
        inputs = torch.tanh(F.linear(inputs, params["hidden.weight"], params["hidden.bias"]))
    return F.linear(inputs, params["output.weight"], params["output.bias"])
