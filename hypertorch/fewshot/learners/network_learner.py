"""Learners that adapt all weights of a network in each episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.dynamics import Dynamics
from hypertorch.fewshot._checks import check_num_steps
from hypertorch.fewshot.episodes import Episode, Examples
from hypertorch.fewshot.learners.backbone_checks import fit_and_predict
from hypertorch.fewshot.learners.base import Embedding, Learner
from hypertorch.fewshot.learners.episode_checks import (
    check_dtype,
    check_examples,
    check_hparams_of,
    integers_explained,
)
from hypertorch.fewshot.learners.objectives import Objective, QuerySet, chosen_objective
from hypertorch.fewshot.learners.step_sizes import LearnLR, learnt_step_size
from hypertorch.nn.functional_module import FunctionalModule
from hypertorch.problem import BilevelProblem, InnerProblem, OuterProblem
from hypertorch.types import TensorDict
from hypertorch.unroll import unroll


class NetworkLearner(Learner):
    """Abstract: all weights of a network are trained on the support set, from weights that all episodes share.

    Outer variables: the network's weights `theta`, and step sizes where `learn_lr` says so. Inner variables: a copy
    of the weights per episode, `w_0 = theta`, trained on the support set for `num_steps` steps. The network fits in
    training mode and predicts in evaluation mode; its buffers are carried through the inner loop. A norm layer with
    running statistics, or a spectral norm, must be handed over in evaluation mode, and keeps what it has stored as
    constants.

    A subclass writes `problem`. It joins an inner and an outer problem by `bilevel`: `support_problem` and
    `query_problem`, or others made of these.

    Args:
        network: from inputs to outputs; for classification it ends with `way` logits. It is copied.
        dynamics: the inner optimiser.
        num_steps: inner steps (unit: steps).
        learn_lr: None, or `per` of the `ht.Hyper` that takes the place of the step size: "one", "step", "parameter" or
            "step,parameter".
        objective: loss and metrics of support and query; classification by default.

    Raises:
        ValueError: if `learn_lr` does not fit the dynamics, a name is used twice, or the network has nothing to train.
        IncompatibleBackendError: if the network has a layer whose hypergradient PyTorch would get wrong.
    """

    @typed("network", "dynamics", "num_steps")
    def __init__(
        self,
        network: nn.Module,
        *,
        dynamics: Dynamics,
        num_steps: int,
        learn_lr: LearnLR = None,
        objective: Objective | None = None,
    ) -> None:
        self._fit, self._predict = fit_and_predict(network)
        self._objective = chosen_objective(objective)
        check_num_steps(num_steps)
        self._num_steps = num_steps
        initial = self._fit.init_params()
        initialisation = {name: initial[name] for name in self._fit.trained_names()}
        if not initialisation:
            raise ValueError(
                "`network` has no trainable parameter: there is nothing to learn or adapt. Set `requires_grad` on some."
            )
        self._dynamics, step_sizes = learnt_step_size(dynamics, learn_lr, initialisation, num_steps)
        owned = self._dynamics.init_hparams().keys()
        # Outer variables are one dictionary by name: the second of a name would silently replace the first.
        clash = sorted((step_sizes.keys() | owned) & initialisation.keys() | step_sizes.keys() & owned)
        if clash:
            raise ValueError(
                f"`network` has parameters called {clash}, which are outer variables of the learner or its dynamics "
                "too: one value would be both. Rename those of the module."
            )
        self._initial: TensorDict = {**initialisation, **step_sizes}
        some = next(iter(initialisation.values()))
        self._owned = {name: value.to(some) for name, value in self._dynamics.init_hparams().items()}

    def init_hparams(self) -> TensorDict:
        """Returns the network's weights, by their names in the module, learnt step sizes, and those of the dynamics."""
        # Copies: optimizers change tensors in place, and the learner is to start any number of runs.
        return {name: value.clone() for name, value in {**self._initial, **self._owned}.items()}

    def support_problem(
        self, episode: Episode, *, minibatch: Callable[[Examples, int], Examples] | None = None
    ) -> SupportProblem:
        """Returns the inner problem: the loss of the support set, from the shared weights.

        Args:
            episode: the batch of episodes.
            minibatch: from the support set and the inner step to the examples that the step fits, with the axes of the
                support set; a pure function. None fits all of them.
        """
        return SupportProblem(
            owner=type(self).__name__,
            network=self._fit,
            objective=self._objective,
            support=episode.support,
            expected=self._initial,
            minibatch=minibatch,
        )

    def query_problem(self, episode: Episode) -> QueryProblem:
        """Returns the outer problem: the loss of the query set at the fitted weights."""
        return QueryProblem(
            network=self._predict, objective=self._objective, examples=episode.query, initial=self._initial
        )

    def bilevel(self, inner: InnerProblem, outer: OuterProblem, num_tasks: int | None) -> BilevelProblem:
        """Returns the bilevel problem of an inner and an outer problem, with this learner's dynamics and horizon."""
        return BilevelProblem(inner, outer, dynamics=self._dynamics, num_steps=self._num_steps, num_tasks=num_tasks)

    def adapt(self, hparams: TensorDict, support: Examples) -> Callable[[Tensor], Tensor]:
        """Returns the network with weights fitted to the support set.

        Args:
            hparams: trained outer variables.
            support: inputs of shape `(way * shot, ...)` and targets; no tasks axis.
        """
        check_examples(support, "support")
        check_dtype(support.inputs, "support", hparams)
        # The support set takes the place of the queries: only the inner loop is run, and it reads none.
        problem = self.problem(Episode(support, support), None)
        with integers_explained(support.inputs, "support"):
            # Cross-entropy would stop at such a label on the host with PyTorch's words, and on a GPU with an assertion
            # that ends the process's use of it.
            if not support.targets.is_floating_point():
                self._check_outputs(problem.inner.init_params(hparams), support)
            return _Fitted(self._predict, unroll(problem, hparams).params)

    def _check_outputs(self, params: TensorDict, support: Examples) -> None:
        """Raises `ValueError` if a label has no output."""
        with torch.no_grad():
            way = self._predict(params, support.inputs).shape[-1]
        last = int(support.targets.max())
        if last >= way:
            raise ValueError(
                f"`support` has labels up to {last}, but the network has {way} outputs, for labels 0 to {way - 1}. "
                f"Number the classes of the task anew, or build the network with `way={last + 1}`."
            )

    def embed(self, hparams: TensorDict, episode: Episode) -> Embedding:
        """Returns what enters the network's last linear layer for the queries, by the shared and the fitted weights.

        A network without one is shown by its outputs.

        Args:
            hparams: trained outer variables.
            episode: one episode, no tasks axis.
        """
        problem = self.problem(episode, None)
        shared, fitted = problem.inner.init_params(hparams), unroll(problem, hparams).params
        inputs = episode.query.inputs
        return Embedding(_features(self._predict, shared, inputs), _features(self._predict, fitted, inputs))


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A network with weights fitted to one support set; can be copied and pickled, as far as the network can."""

    network: FunctionalModule
    params: TensorDict

    def __call__(self, inputs: Tensor) -> Tensor:
        check_dtype(inputs, "inputs", self.params)
        with torch.no_grad(), integers_explained(inputs, "inputs"):
            return self.network(self.params, inputs)


def _features(network: FunctionalModule, params: TensorDict, inputs: Tensor) -> Tensor:
    """Returns what enters a network's last linear layer, shape `(batch, features)`; its outputs if it has none."""
    seen: list[Tensor] = []
    layers = [module for module in network.module.modules() if isinstance(module, nn.Linear)]
    # The last in the order in which the module lists them: of a classifier, as a rule, its last layer.
    hooks = [layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])) for layer in layers[-1:]]
    try:
        with torch.no_grad():
            outputs = network(params, inputs)
    finally:
        # The module is the learner's own: a hook left behind would run in every later step.
        for hook in hooks:
            hook.remove()
    # The first call, if the layer is called several times.
    return seen[0].flatten(1) if seen else outputs


@dataclass(frozen=True, kw_only=True, eq=False)
class SupportProblem(InnerProblem):
    """Fits a network's weights to support examples, from the weights that all episodes share.

    Args:
        owner: name of the learner, for messages.
        network: the network as it fits.
        objective: its loss.
        support: the support set of all tasks.
        expected: the outer variables of the learner, for their names and shapes.
        minibatch: from the support set and the inner step to the examples of the step; None for all of them.
    """

    owner: str
    network: FunctionalModule
    objective: Objective
    support: Examples
    expected: TensorDict
    minibatch: Callable[[Examples, int], Examples] | None = None

    def __post_init__(self) -> None:
        """Takes over the network's buffers, which are carried along untrained."""
        object.__setattr__(self, "buffers", self.network.buffers)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the shared weights and the buffers that the network has stored."""
        check_hparams_of(self.owner, hparams, self.expected)
        trained = {name: hparams[name] for name in self.network.trained_names()}
        some = next(iter(trained.values()))
        # To the device alone: buffers may be counters, which are integers.
        stored = {name: value.to(some.device) for name, value in self.network.module.named_buffers()}
        return {**trained, **stored}

    def batch(self, step: int) -> Examples:
        """Returns the examples of an inner step."""
        return self.support if self.minibatch is None else self.minibatch(self.support, step)

    def full_batch(self) -> Examples:
        """Returns the whole support set."""
        return self.support

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Examples) -> tuple[Tensor, TensorDict]:
        """Returns the loss of the examples, and the new buffers."""
        # Returned and not stored: in the module, tasks and repeated steps would overwrite each other's buffers.
        outputs, new_buffers = self.network.with_buffers(params, batch.inputs)
        return self.objective.loss(outputs, batch.targets), new_buffers


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryProblem(QuerySet):
    """Judges fitted weights on query examples, those of all tasks.

    Args:
        network: the network as it predicts.
    """

    network: FunctionalModule

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Examples) -> Tensor:
        """Returns the loss of the query set."""
        # Params hold the buffers, too: in evaluation mode queries are normalised by what the support set has left
        # there.
        return self.objective.loss(self.network(params, batch.inputs), batch.targets)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Examples) -> TensorDict:
        """Returns what the objective reports of the query set."""
        return self.objective.metrics(self.network(params, batch.inputs), batch.targets)
