"""Meta-SGD: an initialisation and a step size for every weight are the outer variables."""

from __future__ import annotations

from torch import nn

from hypertorch.checks.argument_types import typed
from hypertorch.dynamics import Dynamics
from hypertorch.fewshot.episodes import Episode
from hypertorch.fewshot.learners.network_learner import NetworkLearner
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.problem import BilevelProblem


class MetaSGD(NetworkLearner):
    """All weights are adapted from a learnt initialisation, each with a learnt step size of its own.

    `w = theta - alpha * grad L(theta)` elementwise, with outer variables `theta` and `log alpha`. The logarithm keeps
    the step sizes positive; the paper lets them change sign.

    Cost: that of MAML, with twice as many outer variables.

    Arguments that are not named here are those of `NetworkLearner`.

    Args:
        dynamics: the inner optimiser; its step size is where all step sizes start.
        num_steps: inner steps (unit: steps); 1 in the paper.

    Raises:
        ValueError: if the dynamics has no step size to learn, or the network has nothing to train.
        IncompatibleBackendError: if the network has a layer whose hypergradient PyTorch would get wrong.

    References:
        Li, Zhou, Chen and Li (2017), Meta-SGD: learning to learn quickly for few-shot learning, equation 2.
    """

    @typed("network", "dynamics", "num_steps")
    def __init__(
        self, network: nn.Module, *, dynamics: Dynamics, num_steps: int = 1, objective: Objective | None = None
    ) -> None:
        # Equation 2 of the paper: alpha has an entry for each entry of theta.
        super().__init__(network, dynamics=dynamics, num_steps=num_steps, learn_lr="parameter", objective=objective)

    def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem: the loss of the support set below that of the query set."""
        return self.bilevel(self.support_problem(episode), self.query_problem(episode), num_tasks)
