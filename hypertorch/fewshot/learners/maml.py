"""Model-agnostic meta-learning: the initialisation of the inner loop is the outer variable."""

from __future__ import annotations

from hypertorch.fewshot.episodes import Episode
from hypertorch.fewshot.learners.network_learner import NetworkLearner
from hypertorch.problem import BilevelProblem


class MAML(NetworkLearner):
    """All weights are adapted to the support set from an initialisation that is learnt.

    Outer variables: the network's weights `theta`, and step sizes where `learn_lr` says so. Inner variables: a copy
    of the weights per episode, `w_0 = theta`, trained on the support set for `num_steps` steps. Outer loss: that of
    the query set at `w_T`. First-order MAML is the same learner under the backend `FirstOrder`.

    Cost: per episode, `num_steps` steps on the support set and their second derivatives, one pass over the query set.

    Arguments are those of `NetworkLearner`.

    References:
        Finn, Abbeel and Levine (2017), algorithms 1 and 2, and section 5.2 (first order); Antoniou, Edwards and
        Storkey (2019), section 4 (step sizes per step).
    """

    def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem: the loss of the support set below that of the query set."""
        return self.bilevel(self.support_problem(episode), self.query_problem(episode), num_tasks)
