"""Learners that fit a head in each episode, on features of a representation that all episodes share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn

from hypertorch import tree
from hypertorch.checks import is_count
from hypertorch.dynamics import Dynamics
from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot.backbones.feature_norm import mean_and_spread
from hypertorch.fewshot.episodes import Episode, Examples
from hypertorch.fewshot.learners.backbone_checks import first_parameter, fit_and_predict, refuse_dropout
from hypertorch.fewshot.learners.base import Embedding, Learner
from hypertorch.fewshot.learners.episode_checks import (
    check_dtype,
    check_examples,
    check_hparams_of,
    integers_explained,
)
from hypertorch.fewshot.learners.objectives import Classification, Objective
from hypertorch.problem import BilevelProblem, InnerProblem, OuterProblem
from hypertorch.types import TensorDict
from hypertorch.unroll import unroll


class HeadLearner(Learner):
    """Abstract: a head is fitted in an episode, on features of a representation that is learnt by the outer loop.

    Outer variables: the weights of the representation, and what a subclass adds. Inner variables: a head per episode,
    which a subclass gives a first value (`first_head`) and outputs (`outputs`); `num_steps` steps of the dynamics on
    the support set move it, none where the first value is the solution: backends that need an inner loss or a step
    (`Implicit`, `EvoGrad`, `OneStep`) are then refused. Outer loss: that of the query set. Features do not depend on
    the head, so they are computed once per episode, and one vjp carries the hypergradient through them.

    A representation without buffers sees support and query in one call, so that batch norm by episode statistics
    normalises them together. One with buffers (running statistics) sees the support set in training mode, and the
    query set in evaluation mode with the statistics of the support. One of PyTorch's norm layers with running
    statistics, or a spectral norm, must be handed over in evaluation mode, and keeps what it has stored as constants.

    Cost: per episode, one pass and one vjp of the representation; `num_steps` steps of the head.

    Args:
        backbone: from inputs to features, shape `(batch, features)`. It is copied.
        way: outputs of the head.
        dynamics: the inner optimiser.
        num_steps: inner steps (unit: steps).
        objective: loss and figures of support and query; classification by default.
        normalise: centre features by the mean of the support's and divide them by the support's root mean square
            distance from it.
        own_hparams: outer variables beside the representation's weights; their names must differ from those.

    Raises:
        ValueError: if `way` is below 1, a name is used twice, or the backbone has dropout or nothing to train.
        IncompatibleBackendError: if the backbone has a layer whose hypergradient PyTorch would get wrong.
    """

    needs_every_class = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        way: int,
        dynamics: Dynamics,
        num_steps: int,
        objective: Objective | None,
        normalise: bool,
        own_hparams: TensorDict,
    ) -> None:
        if not is_count(way):
            raise ValueError(f"`way` is {way!r}: the head needs at least one output. Pass the number of classes.")
        refuse_dropout(backbone)
        some = first_parameter(backbone)
        self._fit, self._predict = fit_and_predict(backbone)
        self.way = way
        self._objective = objective or Classification()
        self._dynamics = dynamics
        self._num_steps = num_steps
        self._normalise = normalise
        self._names = self._fit.trained_names()
        owned = dynamics.init_hparams().keys()
        clash = sorted((own_hparams.keys() | owned) & set(self._names) | own_hparams.keys() & owned)
        if clash:
            raise ValueError(
                f"`backbone` has parameters called {clash}, which are outer variables of the learner or its dynamics "
                "too: one value would be both. Rename those of the module."
            )
        initial = self._fit.init_params()
        self._initial: TensorDict = {**{name: initial[name] for name in self._names}, **own_hparams}
        if not self._initial:
            raise ValueError(
                f"`backbone` is a {type(backbone).__name__} with all its parameters frozen, and {type(self).__name__} "
                "has no outer variable of its own: there is nothing to learn. Set `requires_grad` on some."
            )
        self._owned = {name: value.to(some) for name, value in dynamics.init_hparams().items()}

    @property
    def is_closed_form(self) -> bool:
        """Whether the first head is the solution, so that there is no inner loop."""
        return self._num_steps == 0

    @abstractmethod
    def first_head(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
        """Returns the head before the first inner step, or the solution where there is no inner loop.

        Args:
            support: features of one episode's support set, shape `(way * shot, features)`.
            targets: their labels or values.
            hparams: the outer variables.
        """

    @abstractmethod
    def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
        """Returns logits or values for features of one episode.

        Args:
            head: the fitted head.
            features: shape `(batch, features)`.
            hparams: the outer variables.
        """

    def init_hparams(self) -> TensorDict:
        """Returns the representation's weights, by their names in the module, and the learner's own variables.

        Those of the dynamics, such as the weights of a learnt update rule, are among them.
        """
        return {name: value.clone() for name, value in {**self._initial, **self._owned}.items()}

    def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem of a batch of episodes."""
        return BilevelProblem(
            _Head(self, self._objective),
            _HeldOut(self, self._objective, episode, self._initial),
            dynamics=self._dynamics,
            num_steps=self._num_steps,
            num_tasks=num_tasks,
            context=self._features_of_one if num_tasks is None else self._features,
        )

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
        unlabelled = support.targets[:1].expand(len(inputs), *support.targets.shape[1:])
        episode = Episode(support, Examples(inputs, unlabelled))
        head = unroll(self.problem(episode, None), hparams).params
        with torch.no_grad():
            return self.outputs(head, self._features_of_one(hparams, episode)["query"], hparams)

    def embed(self, hparams: TensorDict, episode: Episode) -> Embedding:
        """Returns the queries' features, which no head has seen yet, and the outputs of the fitted head.

        Args:
            hparams: trained outer variables.
            episode: one episode, no tasks axis.
        """
        with torch.no_grad():
            features = self._features_of_one(hparams, episode)["query"]
        return Embedding(features, self.adapt(hparams, episode.support)(episode.query.inputs))

    def _features_of_one(self, hparams: TensorDict, episode: Episode) -> TensorDict:
        """Returns support and query features of one episode, with its labels: the context of the inner loop."""
        check_hparams_of(type(self).__name__, hparams, self._initial)
        weights = {name: hparams[name] for name in self._names}
        support, query = episode.support.inputs, episode.query.inputs
        if self._fit.buffers:
            support_features, stored = self._fit.with_buffers(weights, support)
            query_features = self._predict({**weights, **stored}, query)
        else:
            features = self._fit(weights, torch.cat([support, query]))
            support_features, query_features = features[: len(support)], features[len(support) :]
        if self._normalise:
            centre, spread = mean_and_spread(support_features)
            support_features, query_features = (support_features - centre) / spread, (query_features - centre) / spread
        return {
            "support": support_features,
            "support_targets": episode.support.targets,
            "query": query_features,
            "query_targets": episode.query.targets,
        }

    def _features(self, hparams: TensorDict, episode: Episode) -> TensorDict:
        """Returns the context of a batch of episodes."""
        if self._fit.buffers or len(episode.support.inputs) == 1:
            # Statistics stored in place cannot differ between tasks under vmap; and one task needs none.
            tasks = range(len(episode.support.inputs))
            each = [self._features_of_one(hparams, tree.map_batch(itemgetter(task), episode)) for task in tasks]
            return {name: torch.stack([context[name] for context in each]) for name in each[0]}
        return torch.func.vmap(self._features_of_one, in_dims=(None, 0), randomness="different")(hparams, episode)


def linear_head(head: TensorDict, features: Tensor) -> Tensor:
    """Returns `W x + b` for a head with entries `weight`, shape `(way, features)`, and `bias`, shape `(way,)`."""
    return torch.nn.functional.linear(features, head["weight"], head["bias"])


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A learner with one support set; can be copied and pickled, as far as the backbone can."""

    learner: HeadLearner
    hparams: TensorDict
    support: Examples

    def __call__(self, inputs: Tensor) -> Tensor:
        check_dtype(inputs, "inputs", self.hparams)
        with integers_explained(inputs, "inputs"):
            return self.learner._outputs(self.hparams, self.support, inputs)


@dataclass(frozen=True, eq=False)
class _Head(InnerProblem):
    """Fits a head to the support features of the context."""

    learner: HeadLearner
    objective: Objective

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return self.learner.first_head(hparams["support"], hparams["support_targets"], hparams)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: None) -> Tensor:
        if self.learner.is_closed_form:
            # Asked for nonetheless, its answer would be silently wrong: the head is no minimum of the support loss.
            name = type(self.learner).__name__
            raise IncompatibleBackendError(
                f"`{name}` has no inner loop (`num_steps` = 0), and its head minimises no inner loss: there is nothing "
                "that this backend could solve or step along. Use `Reverse()`, which differentiates through the head."
            )
        return self.objective.loss(
            self.learner.outputs(params, hparams["support"], hparams), hparams["support_targets"]
        )


@dataclass(frozen=True, eq=False)
class _HeldOut(OuterProblem):
    """Judges a fitted head on the query features of the context."""

    learner: HeadLearner
    objective: Objective
    episode: Episode
    initial: TensorDict

    def init_hparams(self) -> TensorDict:
        return self.initial

    def batch(self, outer_step: int) -> Episode:
        return self.episode

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Episode) -> Tensor:
        return self.objective.loss(self.learner.outputs(params, hparams["query"], hparams), hparams["query_targets"])

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Episode) -> TensorDict:
        outputs = self.learner.outputs(params, hparams["query"], hparams)
        return self.objective.metrics(outputs, hparams["query_targets"])
