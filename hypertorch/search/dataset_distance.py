"""How far data sets are from each other as regards what is good for them: by their losses, and learnt from examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hypertorch.autodiff.noise import mix
from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import check_count
from hypertorch.dynamics import SGD
from hypertorch.nn.functional_module import FunctionalModule
from hypertorch.problem import BilevelProblem, InnerProblem, OuterProblem
from hypertorch.search.deep_set import pad_sets
from hypertorch.search.loss_table import check_loss_table
from hypertorch.types import Batch, TensorDict, TensorMapping


@typed("losses", "others")
def loss_distances(losses: Tensor, others: Tensor) -> Tensor:
    """Returns the mean absolute difference of the losses that the same configurations reach on two data sets.

    It is 0 where every configuration does equally well on both.

    Args:
        losses: validation losses, a row for each data set and a column for each configuration, shape
            `(sets, configurations)`. Their logarithms serve where some configurations diverge.
        others: shape `(other sets, configurations)`.

    Returns:
        Shape `(sets, other sets)`.

    Raises:
        ValueError: if the losses are not finite, or the configurations are not the same.
    """
    for name, table in (("losses", losses), ("others", others)):
        check_loss_table(name, table)
    if losses.shape[1] != others.shape[1]:
        raise ValueError(
            f"`losses` and `others` have {losses.shape[1]} and {others.shape[1]} configurations: the distance compares "
            "one by one. Pass the losses of the same configurations, in the same order."
        )
    return torch.cdist(losses, others, p=1.0) / losses.shape[1]


class DatasetDistance:
    """A learnt distance between data sets, `|embedding(a) - embedding(b)|`, that stands for that of their losses.

    The embedding needs the examples alone. So a data set on which nothing was trained yet finds those that it is
    near to, and their best configurations start its search: see `nearest_best`.

        distance = ht.search.DatasetDistance(ht.search.DeepSet(num_inputs))
        problem = distance.problem(sets, losses)  # for `ht.OuterLoop`, which learns the weights
        distance(weights, [new_set], sets)

    Args:
        network: from `(examples, sizes)` to embeddings, as `DeepSet`.

    Raises:
        TypeError: if it is no module.

    References:
        Kim et al. (2017), Learning to warm-start Bayesian hyperparameter optimization.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = FunctionalModule(network)

    def init_hparams(self) -> TensorDict:
        """Returns the network's own weights."""
        return self._network.init_params()

    def embeddings(self, weights: TensorMapping, sets: Sequence[Tensor]) -> Tensor:
        """Returns the embedding of each data set, shape `(sets, outputs)`.

        Args:
            weights: of the network, by name.
            sets: each of shape `(examples, inputs)`.

        Raises:
            ValueError: if the sets cannot be embedded (see `pad_sets`).
        """
        return self._network(weights, *pad_sets(sets))

    def __call__(self, weights: TensorMapping, sets: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Returns the learnt distances, shape `(sets, other sets)`.

        Args:
            weights: of the network, by name.
            sets: each of shape `(examples, inputs)`.
            others: likewise.

        Raises:
            ValueError: if the sets cannot be embedded (see `pad_sets`).
        """
        embedded, other = self.embeddings(weights, sets), self.embeddings(weights, others)
        # By differences: products would give equal sets a distance.
        return torch.cdist(embedded, other, compute_mode="donot_use_mm_for_euclid_dist")

    def problem(
        self,
        sets: Sequence[Tensor],
        losses: Tensor,
        *,
        batch_size: int = 32,
        num_examples: int | None = None,
        seed: int = 0,
    ) -> BilevelProblem:
        """Returns the problem of learning the distance: its outer variables are the weights, its outer loss the error.

        The outer loss of a step is `mean over pairs of (learnt - true distance)^2`, over all pairs of `batch_size` data
        sets that are drawn for it. There is no inner loop.

        Cost: of an outer step, `batch_size` embeddings forward and backward.

        Args:
            sets: data sets on which the configurations were trained, each of shape `(examples, inputs)`.
            losses: what they reached, shape `(sets, configurations)`: see `loss_distances`.
            batch_size: data sets drawn for an outer step, at least 2 and at most all.
            num_examples: examples of each that a step sees, drawn anew with replacement, against overfitting; None
                for all.
            seed: of the draws.

        Raises:
            ValueError: if the sets cannot be embedded, the losses do not belong to them, or `batch_size` or
                `num_examples` is out of range.
        """
        outer = _PairedSets(
            self._network, pad_sets(sets), losses, batch_size=batch_size, num_examples=num_examples, seed=seed
        )
        return BilevelProblem(_NoTraining(), outer, dynamics=SGD(lr=0.0), num_steps=0, seed=seed)


class _NoTraining(InnerProblem):
    """Distances are learnt by the outer loop alone."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        raise TypeError("there is no inner step")


class _PairedSets(OuterProblem):
    """The error of learnt distances over all pairs of the data sets of a batch."""

    def __init__(
        self,
        network: FunctionalModule,
        padded: tuple[Tensor, Tensor],
        losses: Tensor,
        *,
        batch_size: int,
        num_examples: int | None,
        seed: int,
    ) -> None:
        check_loss_table("losses", losses)
        if len(losses) != len(padded[0]):
            raise ValueError(
                f"`losses` has {len(losses)} rows, but there are {len(padded[0])} data sets in `sets`: each has its "
                "own losses. Pass a row for each set, in the same order."
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 2 <= batch_size <= len(losses):
            raise ValueError(
                f"`batch_size` is {batch_size!r}: a step compares at least two of the {len(losses)} data sets, and "
                f"draws each once. Pass a whole number from 2 to {len(losses)}."
            )
        if num_examples is not None:
            why = "a step sees at least one example of each data set"
            check_count("`num_examples`", num_examples, why, advice=", or None for all")
        self._network = network
        self._examples, self._sizes = padded
        self._goals = loss_distances(losses, losses).to(self._examples)
        self._batch_size, self._num_examples, self._seed = batch_size, num_examples, seed

    def init_hparams(self) -> TensorDict:
        return self._network.init_params()

    def batch(self, outer_step: int) -> Batch:
        generator = torch.Generator().manual_seed(mix(self._seed, outer_step))
        drawn = torch.randperm(len(self._sizes), generator=generator)[: self._batch_size].to(self._sizes.device)
        first, second = torch.triu_indices(self._batch_size, self._batch_size, offset=1, device=drawn.device)
        sizes = self._sizes[drawn]
        if self._num_examples is None:
            examples = self._examples[drawn, : int(sizes.max())]
        else:
            places = torch.rand(self._batch_size, self._num_examples, generator=generator, dtype=torch.float64)
            rows = (places.to(sizes.device) * sizes.unsqueeze(1)).long()
            examples = self._examples[drawn.unsqueeze(1), rows]
        return examples, sizes, first, second, self._goals[drawn[first], drawn[second]]

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        examples, sizes, first, second, goals = batch
        embedded = self._network(hparams, examples, sizes)
        # Its derivative is 0, not NaN, where two embeddings are equal.
        learnt = torch.linalg.vector_norm(embedded[first] - embedded[second], dim=1)
        return (learnt - goals).square().mean()
