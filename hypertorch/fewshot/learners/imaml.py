"""Implicit MAML: the inner solution is tied to the shared weights, and differentiated without unrolling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.dynamics import Dynamics
from hypertorch.fewshot.episodes import Episode, Examples
from hypertorch.fewshot.learners.network_learner import NetworkLearner, SupportProblem
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.problem import BilevelProblem, InnerProblem
from hypertorch.types import TensorDict


class IMAML(NetworkLearner):
    """All weights are adapted near the shared weights, to which a proximal term ties them.

    The inner loss is `L(w) + proximity / 2 |w - theta|^2`. At its minimum the hypergradient needs no unrolling, only
    the solution of `(I + H / proximity) g = dE/dw`, which the backend `Implicit` finds by conjugate gradients; its
    memory does not grow with the inner steps. Other backends differentiate the same inner loop by unrolling.

    Cost: per episode, `num_steps` steps on the support set, and one Hessian-vector product per iteration of the solve.

    Arguments that are not named here are those of `NetworkLearner`.

    Args:
        num_steps: inner steps (unit: steps); enough to come near the minimum.
        proximity: strength of the proximal term, above 0 (the paper's lambda).

    Raises:
        ValueError: if `proximity` is not above 0, or the network has nothing to train.
        IncompatibleBackendError: if the network has a layer whose hypergradient PyTorch would get wrong.

    References:
        Rajeswaran, Finn, Kakade and Levine (2019), Meta-learning with implicit gradients, equations 3 and 6.
    """

    @typed("proximity")
    def __init__(
        self,
        network: nn.Module,
        *,
        dynamics: Dynamics,
        num_steps: int,
        proximity: float = 2.0,
        objective: Objective | None = None,
    ) -> None:
        # Written as what is allowed, so that NaN is refused.
        if not 0.0 < proximity < math.inf:
            raise ValueError(
                f"`proximity` is {proximity}: without a proximal term the solution forgets the shared weights. Pass a "
                "number above 0; 2 is the paper's."
            )
        super().__init__(network, dynamics=dynamics, num_steps=num_steps, objective=objective)
        self._proximity = proximity

    def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem: the support set's loss with the proximal term, below that of the query set."""
        inner = _NearSharedWeights(support=self.support_problem(episode), proximity=self._proximity)
        return self.bilevel(inner, self.query_problem(episode), num_tasks)


@dataclass(frozen=True, kw_only=True, eq=False)
class _NearSharedWeights(InnerProblem):
    """The support set's loss and `proximity / 2 |w - theta|^2`."""

    support: SupportProblem
    proximity: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", self.support.buffers)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return self.support.init_params(hparams)

    def batch(self, step: int) -> Examples:
        return self.support.batch(step)

    def full_batch(self) -> Examples:
        return self.support.full_batch()

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Examples) -> tuple[Tensor, TensorDict]:
        loss, new_buffers = self.support.loss(params, hparams, batch)
        # The shared weights are outer variables of the same names; buffers are no weights.
        distances = [(params[name] - hparams[name]).square().sum() for name in params if name not in self.buffers]
        # Equation 3 of the paper. Its gradient vanishes where w = theta, so the first step is that of the support loss.
        return loss + 0.5 * self.proximity * sum(distances), new_buffers
