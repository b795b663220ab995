"""Learners whose head is solved for in closed form: no inner step is taken."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.dynamics import Dynamics
from hypertorch.fewshot.episodes import Episode
from hypertorch.fewshot.learners.feature_learner import FeatureLearner, GivenHead, QueryFeatures, no_inner_loop
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict


class ClosedFormHead(FeatureLearner):
    """Abstract: the head of an episode is a closed form of its support features and labels.

    A subclass writes `solve`, the head, and `outputs`, how it answers. The hypergradient goes through both. Every
    backend that reaches the initialisation gives it; backends that need an inner loss or a step (`Implicit`,
    `EvoGrad`, `OneStep`) are refused. Outer variables and arguments are those of `FeatureLearner`.

    Cost: per episode, one pass and one vjp of the representation, and of `solve`.
    """

    @abstractmethod
    def solve(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
        """Returns the head of an episode.

        Args:
            support: features of the support set, shape `(way * shot, features)`.
            targets: their labels or values.
            hparams: the outer variables.
        """

    def context(self, hparams: TensorDict, episode: Episode) -> TensorDict:
        """Returns the head, `head.{entry}`, and the features of the queries, `query`."""
        # Solved here and not where params are made: features and labels are both at hand.
        support, query = self.features(hparams, episode)
        head = self.solve(support, episode.support.targets, hparams)
        # Prefixed, as a head may have an entry of any name, `query` as well.
        return {**tree.with_prefix("head", head), "query": query}

    def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem of a batch of episodes: the head is the first and the last inner state."""
        owner = type(self).__name__
        return BilevelProblem(
            # With no step the first params are the last, so the head reaches the outer loss as the initialisation.
            GivenHead(owner=owner, head=_solved),
            QueryFeatures(learner=self, objective=self._objective, examples=episode, initial=self._initial),
            dynamics=_NoStep(owner=owner),
            num_steps=0,
            num_tasks=num_tasks,
            context=self.context if num_tasks is None else self.contexts,
        )


def _solved(hparams: TensorDict, context: TensorDict) -> TensorDict:  # noqa: ARG001 (as a head may depend on them)
    return tree.without_prefix("head", context)


@dataclass(frozen=True, kw_only=True, eq=False)
class _NoStep(Dynamics):
    """The inner optimiser of a problem without an inner step."""

    owner: str

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {}

    def step(
        self, loss: InnerLoss, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        # Only a backend that solves for a fixed point of the step arrives here: `Implicit(map="step")`.
        raise no_inner_loop(self.owner)
