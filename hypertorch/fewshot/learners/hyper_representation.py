"""Hyper-representation: a shared representation is the outer variable, a linear head per episode the inner one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn

from hypertorch import tree
from hypertorch.dynamics import Dynamics
from hypertorch.fewshot.episodes import Episode, Examples
from hypertorch.fewshot.learners.base import Learner, check_examples, check_hparams_of
from hypertorch.fewshot.learners.objectives import Classification, Objective
from hypertorch.fewshot.learners.step_sizes import LOG_LR, LearnLR, learnt_step_size
from hypertorch.functional import FunctionalModule, refuse_untracked_statistics
from hypertorch.problem import BilevelProblem, InnerProblem, OuterProblem
from hypertorch.types import TensorDict
from hypertorch.unroll import unroll

_TINY = 1e-12  # keeps the derivative of the root finite where all support features are equal


class HyperRepresentation(Learner):
    """Only a linear head is trained in an episode, on features of a representation that is learnt by the outer loop.

    Outer variables: the weights of the representation `h`, and the step size where `learn_lr` says so. Inner
    variables: a linear head per episode, `W (h(x) - m) / r + b`, from zero, trained on the support set for
    `num_steps` steps; `m` is the mean of the support features and `r` their root mean square distance from it. Outer
    loss: that of the query set at the trained head. Features do not depend on the inner variables, so they are
    computed once per episode, and one vjp carries the hypergradient through them.

    Centring and scaling keep the inner loop stable while the representation changes: gradient descent diverges, with
    no error, where curvature times step size exceeds 2, and features after a ReLU share a large mean that makes the
    head's curvature several times what the task needs. Trained without, a learnt step size drifts into that edge.

    A representation without buffers sees support and query in one call, so that batch norm by episode statistics
    normalises them together. One with buffers (running statistics) sees the support set in training mode, and the
    query set in evaluation mode with the statistics of the support.

    Cost: per episode, one pass and one vjp of the representation; `num_steps` steps of a linear model.

    Args:
        backbone: from inputs to features, shape `(batch, features)`. It is copied.
        way: outputs of the head.
        dynamics: the inner optimiser.
        num_steps: inner steps (unit: steps).
        learn_lr: None, or learn the step size: "one", or per "step".
        objective: loss and figures of support and query; classification by default.

    Raises:
        ValueError: if `way` is below 1, or `learn_lr` does not fit.
        IncompatibleBackendError: if the backbone has a layer whose hypergradient PyTorch would get wrong.

    References:
        Franceschi, Frasconi, Salzo, Grazzi and Pontil (2018), Bilevel programming for hyperparameter optimization and
        meta-learning, section 4 and equation 8.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        way: int = 5,
        dynamics: Dynamics,
        num_steps: int,
        learn_lr: LearnLR = None,
        objective: Objective | None = None,
    ) -> None:
        if way < 1:
            raise ValueError(f"`way` is {way}: the head needs at least one output. Pass the number of classes.")
        if learn_lr not in (None, "one", "step"):
            raise ValueError(
                f"`learn_lr` is {learn_lr!r}, but the head's size is known only with the features: it has one step "
                "size, or one per step. Use None, 'one' or 'step'."
            )
        refuse_untracked_statistics(backbone)
        self._fit = FunctionalModule(copy.deepcopy(backbone).train())
        self._predict = FunctionalModule(copy.deepcopy(backbone).eval())
        self._way = way
        self._objective = objective or Classification()
        self._num_steps = num_steps
        initial = self._fit.init_params()
        representation = {name: initial[name] for name in self._fit.trained_names()}
        self._dynamics, step_sizes = learnt_step_size(dynamics, learn_lr, representation, num_steps)
        self._initial: TensorDict = {**representation, **step_sizes}

    def init_hparams(self) -> TensorDict:
        """Returns the representation's weights, by their names in the module, and the logarithm of the step size."""
        return {name: value.clone() for name, value in self._initial.items()}

    def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem of a batch of episodes."""
        return BilevelProblem(
            _Head(self._way, self._objective),
            _HeldOut(self._objective, episode, self._initial),
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
        check_examples(support, "support")

        def outputs(inputs: Tensor) -> Tensor:
            unlabelled = support.targets[:1].expand(len(inputs), *support.targets.shape[1:])
            episode = Episode(support, Examples(inputs, unlabelled))
            head = unroll(self.problem(episode, None), hparams).params
            with torch.no_grad():
                return _linear(head, self._features_of_one(hparams, episode)["query"])

        return outputs

    def _features_of_one(self, hparams: TensorDict, episode: Episode) -> TensorDict:
        """Returns support and query features of one episode, with its labels: the context of the inner loop."""
        check_hparams_of("HyperRepresentation", hparams, self._initial)
        weights = {name: value for name, value in hparams.items() if not name.startswith(LOG_LR)}
        support, query = episode.support.inputs, episode.query.inputs
        if self._fit.buffers:
            support_features, stored = self._fit.with_buffers(weights, support)
            query_features = self._predict({**weights, **stored}, query)
        else:
            features = self._fit(weights, torch.cat([support, query]))
            support_features, query_features = features[: len(support)], features[len(support) :]
        centre = support_features.mean(dim=0)
        spread = (support_features - centre).square().sum(dim=1).mean().add(_TINY).sqrt()
        return {
            "support": (support_features - centre) / spread,
            "support_targets": episode.support.targets,
            "query": (query_features - centre) / spread,
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


@dataclass(frozen=True, eq=False)
class _Head(InnerProblem):
    """Fits a linear head, from zero, to the support features of the context."""

    way: int
    objective: Objective

    def init_params(self, hparams: TensorDict) -> TensorDict:
        features = hparams["support"]
        return {"weight": features.new_zeros(self.way, features.shape[-1]), "bias": features.new_zeros(self.way)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: None) -> Tensor:
        return self.objective.loss(_linear(params, hparams["support"]), hparams["support_targets"])


@dataclass(frozen=True, eq=False)
class _HeldOut(OuterProblem):
    """Judges a fitted head on the query features of the context."""

    objective: Objective
    episode: Episode
    initial: TensorDict

    def init_hparams(self) -> TensorDict:
        return self.initial

    def batch(self, outer_step: int) -> Episode:
        return self.episode

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Episode) -> Tensor:
        return self.objective.loss(_linear(params, hparams["query"]), hparams["query_targets"])

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Episode) -> TensorDict:
        return self.objective.metrics(_linear(params, hparams["query"]), hparams["query_targets"])


def _linear(head: TensorDict, features: Tensor) -> Tensor:
    return torch.nn.functional.linear(features, head["weight"], head["bias"])
