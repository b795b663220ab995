"""Learners with a head for each episode, on features of a representation that all episodes share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor, nn

from hypertorch import tree
from hypertorch.checks.argument_types import typed
from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot._checks import check_way
from hypertorch.fewshot.episodes import Episode, Examples
from hypertorch.fewshot.learners.backbone_checks import first_parameter, fit_and_predict, refuse_dropout
from hypertorch.fewshot.learners.base import Embedding, Learner
from hypertorch.fewshot.learners.episode_checks import (
    check_dtype,
    check_examples,
    check_hparams_of,
    integers_explained,
)
from hypertorch.fewshot.learners.objectives import Objective, QuerySet, chosen_objective
from hypertorch.nn.feature_norm import mean_and_spread
from hypertorch.problem import InnerProblem
from hypertorch.types import TensorDict
from hypertorch.unroll import unroll


class FeatureLearner(Learner):
    """Abstract: a head per episode, on features of a representation that is learnt by the outer loop.

    Outer variables: the weights of the representation, and `own_hparams`. Inner variables: a head per episode.
    `HeadLearner` fits the head in an inner loop, `ClosedFormHead` solves for it. Features do not depend on the head, so
    they are computed once per episode, and one vjp carries the hypergradient through them.

    A representation without buffers sees support and query in one call, so that batch norm by episode statistics
    normalises them together. One with buffers (running statistics) sees the support set in training mode, and the
    query set in evaluation mode with the statistics of the support. One of PyTorch's norm layers with running
    statistics, or a spectral norm, must be handed over in evaluation mode, and keeps what it has stored as constants.

    Args:
        backbone: from inputs to features, shape `(batch, features)`. It is copied.
        way: outputs of the head.
        objective: loss and metrics of support and query; classification by default.
        normalise: centre features by the mean of the support's and divide them by the support's root mean square
            distance from it. None for what the class says.
        own_hparams: outer variables beside the representation's weights; their names must differ from those.

    Raises:
        ValueError: if `way` is below 1, a name is used twice, or the backbone has dropout or nothing to train.
        IncompatibleBackendError: if the backbone has a layer whose hypergradient PyTorch would get wrong.

    Attributes:
        normalises: whether features are normalised unless `normalise` says otherwise.
    """

    needs_every_class = True
    normalises: ClassVar[bool] = False

    @typed("backbone", "normalise", "own_hparams")
    def __init__(
        self,
        backbone: nn.Module,
        *,
        way: int,
        objective: Objective | None = None,
        normalise: bool | None = None,
        own_hparams: TensorDict | None = None,
    ) -> None:
        check_way(way)
        refuse_dropout(backbone)
        first_parameter(backbone)  # raises if there is none, whatever a subclass learns beside
        self._fit, self._predict = fit_and_predict(backbone)
        self.way = way
        self._objective = chosen_objective(objective)
        self._normalise = self.normalises if normalise is None else normalise
        self._names = self._fit.trained_names()
        own = own_hparams or {}
        self._refuse_names(own.keys() & set(self._names))
        initial = self._fit.init_params()
        self._initial: TensorDict = {**{name: initial[name] for name in self._names}, **own}
        if not self._initial:
            raise ValueError(
                f"`backbone` is a {type(backbone).__name__} with all its parameters frozen, and {type(self).__name__} "
                "has no outer variable of its own: there is nothing to learn. Set `requires_grad` on some."
            )

    def _refuse_names(self, clash: set[str]) -> None:
        if clash:
            raise ValueError(
                f"`backbone` has parameters called {sorted(clash)}, which are outer variables of the learner or its "
                "dynamics too: one value would be both. Rename those of the module."
            )

    @abstractmethod
    def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
        """Returns logits or values for features of one episode.

        Args:
            head: the fitted head.
            features: shape `(batch, features)`.
            hparams: the outer variables.
        """

    @abstractmethod
    def context(self, hparams: TensorDict, episode: Episode) -> TensorDict:
        """Returns what is computed once per episode, before any inner step: the features of the queries, `query`.

        Args:
            hparams: the outer variables.
            episode: one episode, without a tasks axis.
        """

    def init_hparams(self) -> TensorDict:
        """Returns the representation's weights, by their names in the module, and the learner's own variables."""
        # Copies: optimizers change tensors in place, and the learner is to start any number of runs.
        return {name: value.clone() for name, value in self._initial.items()}

    def features(self, hparams: TensorDict, episode: Episode) -> tuple[Tensor, Tensor]:
        """Returns support and query features of one episode, each of shape `(examples, features)`.

        Args:
            hparams: the outer variables.
            episode: one episode, without a tasks axis.
        """
        check_hparams_of(type(self).__name__, hparams, self._initial)
        weights = {name: hparams[name] for name in self._names}
        support, query = episode.support.inputs, episode.query.inputs
        if self._fit.buffers:
            # Inductive: the support set makes the statistics, and each query is normalised by them alone.
            support_features, stored = self._fit.with_buffers(weights, support)
            query_features = self._predict({**weights, **stored}, query)
        else:
            # Transductive: one call, so that the statistics are those of support and queries together, as in training
            # and in use.
            both = self._fit(weights, torch.cat([support, query]))
            support_features, query_features = both[: len(support)], both[len(support) :]
        if self._normalise:
            # By the support alone, whatever the norm layers do: no query changes the features of another through this.
            centre, spread = mean_and_spread(support_features)
            support_features, query_features = (support_features - centre) / spread, (query_features - centre) / spread
        return support_features, query_features

    def contexts(self, hparams: TensorDict, episode: Episode) -> TensorDict:
        """Returns the contexts of a batch of episodes, with a leading tasks axis."""
        if self._fit.buffers or len(episode.support.inputs) == 1:
            # Statistics stored in place cannot differ between tasks under vmap; and one task needs none.
            tasks = range(len(episode.support.inputs))
            each = [self.context(hparams, tree.map_batch(itemgetter(task), episode)) for task in tasks]
            return {name: torch.stack([context[name] for context in each]) for name in each[0]}
        # Layers that draw noise draw it for each task, as they do one by one.
        return torch.func.vmap(self.context, in_dims=(None, 0), randomness="different")(hparams, episode)

    def adapt(self, hparams: TensorDict, support: Examples) -> Callable[[Tensor], Tensor]:
        """Returns a function from inputs to outputs, by a head fitted to the support set.

        With episode statistics the features of support and inputs depend on each other, so the head is fitted anew in
        every call; the inputs of one call are classified together.

        Args:
            hparams: trained outer variables.
            support: inputs of shape `(way * shot, ...)` and targets; no tasks axis.
        """
        check_examples(support, "support", way=self.way)
        check_dtype(support.inputs, "support", hparams)
        return _Fitted(self, hparams, support)

    def _outputs(self, hparams: TensorDict, support: Examples, inputs: Tensor) -> Tensor:
        """Returns the outputs of a head fitted to a support set, shape `(batch, outputs)`."""
        # Placeholders of the right shape and type: neither fitting nor features read the labels of queries.
        unlabelled = support.targets[:1].expand(len(inputs), *support.targets.shape[1:])
        episode = Episode(support, Examples(inputs, unlabelled))
        # The head is fitted with these inputs in the episode: under episode statistics they move the support's
        # features.
        head = unroll(self.problem(episode, None), hparams).params
        with torch.no_grad():
            return self.outputs(head, self.features(hparams, episode)[1], hparams)

    def embed(self, hparams: TensorDict, episode: Episode) -> Embedding:
        """Returns the queries' features, which no head has seen yet, and the outputs of the fitted head.

        Args:
            hparams: trained outer variables.
            episode: one episode, no tasks axis.
        """
        with torch.no_grad():
            features = self.features(hparams, episode)[1]
        return Embedding(features, self.adapt(hparams, episode.support)(episode.query.inputs))


@dataclass(frozen=True, eq=False)
# A class, because pickle takes no closure.
class _Fitted:
    """A learner with one support set; can be copied and pickled, as far as the backbone can."""

    learner: FeatureLearner
    hparams: TensorDict
    support: Examples

    def __call__(self, inputs: Tensor) -> Tensor:
        check_dtype(inputs, "inputs", self.hparams)
        with integers_explained(inputs, "inputs"):
            return self.learner._outputs(self.hparams, self.support, inputs)


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenHead(InnerProblem):
    """An inner problem without an inner loop: the head is given, as a closed form of features and labels.

    Args:
        owner: name of the learner, for messages.
        head: from the outer variables and the context to the head.
    """

    owner: str
    head: Callable[[TensorDict, TensorDict], TensorDict]

    def init_params(self, hparams: TensorDict, context: TensorDict) -> TensorDict:
        """Returns the head."""
        return self.head(hparams, context)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: None) -> Tensor:
        """Raises `IncompatibleBackendError`: a number here would be silently wrong, as the head is no minimum of it."""
        raise no_inner_loop(self.owner)


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryFeatures(QuerySet):
    """Judges a fitted head on the query features of the context; its examples are the episodes.

    Args:
        learner: whose head it is.
    """

    learner: FeatureLearner

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Episode, context: TensorDict) -> Tensor:
        """Returns the loss of the queries."""
        return self.objective.loss(self.learner.outputs(params, context["query"], hparams), batch.query.targets)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Episode, context: TensorDict) -> TensorDict:
        """Returns what the objective reports of the queries."""
        return self.objective.metrics(self.learner.outputs(params, context["query"], hparams), batch.query.targets)


def no_inner_loop(owner: str) -> IncompatibleBackendError:
    """Returns the error for a backend that asks for an inner loss or a step where there is none."""
    return IncompatibleBackendError(
        f"`{owner}` has no inner loop (`num_steps` = 0), and its head minimises no inner loss: there is nothing that "
        "this backend could solve or step along. Use `Reverse()`, which differentiates through the head."
    )
