"""Reptile: the shared weights move towards the weights that episodes end with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.dynamics import Dynamics
from hypertorch.fewshot._checks import check_integer
from hypertorch.fewshot.episodes import Episode, Examples
from hypertorch.fewshot.learners.network_learner import NetworkLearner, QueryProblem
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.problem import BilevelProblem, OuterProblem
from hypertorch.types import TensorDict


class Reptile(NetworkLearner):
    """Weights are trained on each episode from the shared weights, which then move towards where they ended.

    The outer step is along `theta - w_T`, which is the gradient of the outer loss `|theta - w_T|^2 / 2` with `w_T`
    held constant. It is a direct term, so every backend that differentiates returns the same; `FirstOrder` and
    `Truncated(window=1)` are the cheapest. `EvolutionStrategies` and `EvoGrad` look at values, of which `w_T` is not
    constant: with them this is another method. The query set is used for figures only, so training episodes may have
    a larger `shot` instead.

    Reptile learns from how the gradients of different minibatches of one task agree (section 5 of the paper), so in
    training the support set should be cut into several: `batch_size`. The minibatches are strided, so a support set
    ordered by class is cut into ones with equally many images of each class (where the number of minibatches divides
    the shot), and each example is used once per pass.

    Cost: per episode, `num_steps` steps on `batch_size` examples; no second derivatives.

    Arguments that are not named here are those of `NetworkLearner`.

    Args:
        dynamics: the inner optimiser; the paper's is Adam without its first momentum.
        num_steps: inner steps (unit: steps); at least 2, as one step gives joint training.
        batch_size: examples of an inner step at most (unit: examples), at least 1; None for the whole support set.

    Raises:
        TypeError: if `batch_size` is no integer.
        ValueError: if `batch_size` is below 1, or the network has nothing to train.
        IncompatibleBackendError: if the network has a layer whose hypergradient PyTorch would get wrong.

    References:
        Nichol, Achiam and Schulman (2018), On first-order meta-learning algorithms, algorithm 2.
    """

    @typed("network", "dynamics", "num_steps")
    def __init__(
        self,
        network: nn.Module,
        *,
        dynamics: Dynamics,
        num_steps: int,
        batch_size: int | None = None,
        objective: Objective | None = None,
    ) -> None:
        if batch_size is not None:
            check_integer(
                "batch_size",
                batch_size,
                minimum=1,
                why="an inner step needs examples",
                advice="use 1 or more, or None for the whole support set",
            )
        self._batch_size = batch_size
        super().__init__(network, dynamics=dynamics, num_steps=num_steps, objective=objective)

    def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem: the support set's loss in minibatches, below the distance to the weights."""
        minibatch = None if self._batch_size is None else partial(self._minibatch, int(num_tasks is not None))
        inner = self.support_problem(episode, minibatch=minibatch)
        return self.bilevel(inner, _Distance(query=self.query_problem(episode)), num_tasks)

    def _minibatch(self, rows: int, support: Examples, step: int) -> Examples:
        """Returns every m-th example, from number `step % m` on; `rows` is the dimension that counts examples."""
        assert self._batch_size is not None
        num_batches = math.ceil(support.targets.shape[rows] / self._batch_size)
        # A slice by a stride is a view: no example is copied. Examples are ordered by class, so neighbours would be of
        # one class.
        chosen = (slice(None),) * rows + (slice(step % num_batches, None, num_batches),)
        return Examples(support.inputs[chosen], support.targets[chosen])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Distance(OuterProblem):
    """Half the squared distance from the shared weights to the fitted ones; the query set is for metrics alone."""

    query: QueryProblem

    def init_hparams(self) -> TensorDict:
        return self.query.init_hparams()

    def batch(self, outer_step: int) -> Examples:
        return self.query.batch(outer_step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Examples) -> Tensor:
        # Buffers and what the dynamics learns are in one of the two alone.
        shared = {name: value for name, value in hparams.items() if name in params}
        # Constant: with the path through the inner loop it would be the gradient of another loss than the paper's step.
        distances = [(value - params[name].detach()).square().sum() for name, value in shared.items()]
        # Algorithm 2: its gradient is theta - w_T, the way from where the episode ended.
        return 0.5 * torch.stack(distances).sum()

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Examples) -> TensorDict:
        return self.query.metrics(params, hparams, batch)
