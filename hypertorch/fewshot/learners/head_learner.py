"""Learners that fit a head in an inner loop, on features of a representation that all episodes share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hypertorch import tree
from hypertorch.checks.argument_types import typed
from hypertorch.dynamics import Dynamics
from hypertorch.fewshot._checks import check_num_steps, check_way
from hypertorch.fewshot.episodes import Episode
from hypertorch.fewshot.learners.backbone_checks import first_parameter
from hypertorch.fewshot.learners.feature_learner import FeatureLearner, GivenHead, QueryFeatures
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.fewshot.learners.step_sizes import LearnLR, learnt_step_size
from hypertorch.problem import BilevelProblem, InnerProblem
from hypertorch.types import TensorDict


class HeadLearner(FeatureLearner):
    """Abstract: a head is trained in an episode, on features of a representation that is learnt by the outer loop.

    A subclass gives the head a first value (`first_head`) and outputs (`outputs`); `num_steps` steps of the dynamics
    on the support set move it. Outer loss: that of the query set. With `num_steps=0` the first head is judged as it is,
    and backends that need an inner loss or a step are refused.

    Cost: per episode, one pass and one vjp of the representation; `num_steps` steps of the head.

    Arguments that are not named here are those of `FeatureLearner`.

    Args:
        way: outputs of the head.
        dynamics: the inner optimiser.
        num_steps: inner steps (unit: steps).
        learn_lr: None, or `per` of the `ht.Hyper` that takes the place of the step size: "one" or "step"; of a head
            whose first weights are learnt "parameter" or "step,parameter" too.

    Raises:
        ValueError: if `way` is below 1, `learn_lr` does not fit, a name is used twice, or the backbone has dropout or
            nothing to train.
        IncompatibleBackendError: if the backbone has a layer whose hypergradient PyTorch would get wrong.
    """

    @typed("backbone", "dynamics", "num_steps", "normalise", "own_hparams")
    def __init__(
        self,
        backbone: nn.Module,
        *,
        way: int = 5,
        dynamics: Dynamics,
        num_steps: int,
        learn_lr: LearnLR = None,
        objective: Objective | None = None,
        normalise: bool | None = None,
        own_hparams: TensorDict | None = None,
    ) -> None:
        check_way(way)
        check_num_steps(num_steps)
        head = self.learnt_head(backbone, way)
        if not head and learn_lr not in (None, "one", "step"):
            raise ValueError(
                f"`learn_lr` is {learn_lr!r}, but the head's size is known only with the features: it has one step "
                "size, or one per step. Use None, 'one' or 'step'."
            )
        some = first_parameter(backbone)
        # Of the head alone: nothing else moves in an episode. Where its shapes are not known, for type and device.
        self._dynamics, step_sizes = learnt_step_size(dynamics, learn_lr, head or {"some": some.detach()}, num_steps)
        self._num_steps = num_steps
        learnt = {**tree.with_prefix("head", head), **step_sizes}
        if clash := sorted((own_hparams or {}).keys() & learnt.keys()):
            raise ValueError(
                f"`own_hparams` has entries called {clash}, which are outer variables of the learner itself: one value "
                "would be both. Call yours otherwise."
            )
        super().__init__(
            backbone,
            way=way,
            objective=objective,
            normalise=normalise,
            own_hparams={**(own_hparams or {}), **learnt},
        )
        # Of the backbone's type and device, as one optimizer moves all of them and one step reads them together.
        self._owned = {name: value.to(some) for name, value in self._dynamics.init_hparams().items()}
        self._refuse_names(self._owned.keys() & self._initial.keys())

    def learnt_head(self, backbone: nn.Module, way: int) -> TensorDict:
        """Returns the head's first weights where they are learnt; they become the outer variables `head.{entry}`.

        By default none: the head starts from what `first_head` makes of the features.

        Args:
            backbone: the representation.
            way: outputs of the head.
        """
        return {}

    @abstractmethod
    def first_head(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
        """Returns the head before the first inner step.

        Args:
            support: features of one episode's support set, shape `(way * shot, features)`.
            targets: their labels or values.
            hparams: the outer variables.
        """

    def init_hparams(self) -> TensorDict:
        """Returns the representation's weights, by their names in the module, and the learner's own variables.

        Those of the dynamics, such as the weights of a learnt update rule, are among them.
        """
        return {**super().init_hparams(), **{name: value.clone() for name, value in self._owned.items()}}

    def context(self, hparams: TensorDict, episode: Episode) -> TensorDict:
        """Returns the features of support and queries, `support` and `query`, and the labels `support_targets`."""
        support, query = self.features(hparams, episode)
        return {"support": support, "support_targets": episode.support.targets, "query": query}

    def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem of a batch of episodes."""
        inner = (
            _SupportFeatures(learner=self, objective=self._objective)
            # Without a step nothing minimises the loss of the support set: a backend that solves for its minimum would
            # be silently wrong.
            if self._num_steps
            else GivenHead(owner=type(self).__name__, head=self._first)
        )
        return BilevelProblem(
            inner,
            QueryFeatures(learner=self, objective=self._objective, examples=episode, initial=self._initial),
            dynamics=self._dynamics,
            num_steps=self._num_steps,
            num_tasks=num_tasks,
            context=self.context if num_tasks is None else self.contexts,
        )

    def _first(self, hparams: TensorDict, context: TensorDict) -> TensorDict:
        return self.first_head(context["support"], context["support_targets"], hparams)


def linear_head(head: TensorDict, features: Tensor) -> Tensor:
    """Returns `W x + b` for a head with entries `weight`, shape `(way, features)`, and `bias`, shape `(way,)`."""
    return torch.nn.functional.linear(features, head["weight"], head["bias"])


@dataclass(frozen=True, kw_only=True, eq=False)
class _SupportFeatures(InnerProblem):
    """Fits a head to the support features of the context."""

    learner: HeadLearner
    objective: Objective

    def init_params(self, hparams: TensorDict, context: TensorDict) -> TensorDict:
        return self.learner._first(hparams, context)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: None, context: TensorDict) -> Tensor:
        # The labels are read from the context, which is cut into tasks once; as a batch they would be cut at each step.
        outputs = self.learner.outputs(params, context["support"], hparams)
        return self.objective.loss(outputs, context["support_targets"])
