"""Classification whose training examples are weighted by outer variables: the job of several works."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import Source
from benchmarks.job import Job, Predict, Stated
from hypertorch.types import Batch, TensorDict


def weighted_examples(
    source: Source,
    network: nn.Module,
    *,
    features: int,
    classes: int,
    rows: int,
    batch_size: int | None = None,
    groups: int | None = None,
    num_steps: int,
    lr: float,
    momentum: float = 0.0,
) -> Job:
    """Returns the job of learning a weight for every training example (data hyper-cleaning).

    The inner loss of a batch `B` is `mean_{i in B} sigmoid(weight[i]) cross_entropy_i`; the outer loss is the mean
    cross-entropy of as many held-out rows.

    Args:
        source: of the data.
        network: an `mlp` from `(rows, features)` to `(rows, classes)`.
        features: numbers per row.
        classes: outputs of the network.
        rows: training examples, and held-out ones.
        batch_size: rows of a step, taken in order and from the start again; None for all.
        groups: examples share this many weights, each a stretch of rows; None for a weight each.
        num_steps: inner steps.
        lr: step size.
        momentum: of the inner gradient descent.
    """
    inputs, targets = source.normal(rows, features), source.labels(classes, rows)
    held_out = (source.normal(rows, features), source.labels(classes, rows))
    batch_size = batch_size or rows
    all_places = torch.arange(rows, device=inputs.device)
    per_group = -(-rows // (groups or rows))

    def inner_loss(predict: Predict, hparams: TensorDict, batch: Batch) -> Tensor:
        rows_in, labels, places = batch
        weights = hparams["weight"] if groups is None else hparams["weight"].repeat_interleave(per_group)
        weights = weights if places is None else weights[places]
        return (weights.sigmoid() * F.cross_entropy(predict(rows_in), labels, reduction="none")).mean()

    def outer_loss(predict: Predict, _: TensorDict, batch: Batch) -> Tensor:
        return F.cross_entropy(predict(batch[0]), batch[1])

    def inner_batch(step: int) -> Batch:
        if batch_size == rows:
            return inputs, targets, None
        start = step * batch_size % (rows - batch_size + 1)
        taken = slice(start, start + batch_size)
        return inputs[taken], targets[taken], all_places[taken]

    return Job(
        network=source.network(network),
        hparams={"weight": source.normal(groups or rows)},
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        inner_batch=inner_batch,
        outer_batch=held_out,
        num_steps=num_steps,
        lr=lr,
        momentum=momentum,
        stated=Stated(
            network="mlp",
            network_settings={"activation": "tanh"},
            losses="weighted_examples",
            loss_settings={"rows": rows, "batch_size": batch_size, "rows_per_weight": per_group},
            data={
                "inputs": inputs,
                "targets": targets,
                "held_out_inputs": held_out[0],
                "held_out_targets": held_out[1],
            },
        ),
    )
