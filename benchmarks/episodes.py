"""Jobs made of few-shot episodes: the learner's problem for hypertorch, the same written out for the peers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.job import Job, Predict, Stated
from hypertorch.fewshot import Classification, Episode, HyperRepresentation, Learner, Objective
from hypertorch.types import Batch, TensorDict

_TINY = 1e-12


def maml_job(
    learner: Learner,
    network: nn.Module,
    objective: Objective,
    episode: Episode,
    *,
    num_steps: int,
    lr: float,
    stated_network: tuple[str, Mapping[str, Any]],
) -> Job:
    """Returns the job of a MAML hypergradient: all weights are adapted, their initialisation is the outer variable.

    Args:
        learner: the library's own `MAML` around the network.
        network: what is adapted.
        objective: the loss.
        episode: support and query examples, with a tasks axis.
        num_steps: inner steps.
        lr: step size.
        stated_network: name and settings of the network in another framework.
    """

    def loss(predict: Predict, _: TensorDict, examples: Batch) -> Tensor:
        return objective.loss(predict(examples.inputs), examples.targets)

    num_tasks = len(episode.support.inputs)
    return Job(
        network=network,
        hparams=learner.init_hparams(),
        inner_loss=loss,
        outer_loss=loss,
        inner_batch=lambda _: episode.support,
        outer_batch=episode.query,
        num_steps=num_steps,
        lr=lr,
        num_tasks=num_tasks,
        own_problem=learner.problem(episode, num_tasks),
        stated=Stated(
            network=stated_network[0],
            network_settings=stated_network[1],
            losses="classification" if isinstance(objective, Classification) else "regression",
            data=_tensors(episode),
        ),
    )


def hyper_representation_job(
    learner: HyperRepresentation,
    backbone: Any,
    episode: Episode,
    *,
    way: int,
    num_steps: int,
    lr: float,
    stated_network: tuple[str, Mapping[str, Any]],
) -> Job:
    """Returns the job of a hyper-representation hypergradient: a linear head is adapted, features are learnt.

    The peers compute the features of support and query of a task in one pass before its inner loop, centre them and
    scale them as the learner does, and train the head on them.

    Args:
        learner: the library's own `HyperRepresentation` around the backbone.
        backbone: from images to features.
        episode: support and query examples, with a tasks axis.
        way: classes.
        num_steps: inner steps.
        lr: step size.
        stated_network: name and settings of the backbone in another framework.
    """
    head = nn.Linear(backbone.num_features, way).to(episode.support.inputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    objective = Classification()

    def features(hparams: TensorDict, own: Episode) -> TensorDict:
        images = torch.cat([own.support.inputs, own.query.inputs])
        found = functional_call(backbone, hparams, (images,))
        support, query = found.split([len(own.support.inputs), len(own.query.inputs)])
        centre = support.mean(dim=0)
        spread = (support - centre).square().sum(dim=1).mean().add(_TINY).sqrt()
        return {"support": (support - centre) / spread, "query": (query - centre) / spread}

    def inner_loss(predict: Predict, hparams: TensorDict, own: Batch) -> Tensor:
        return objective.loss(predict(hparams["support"]), own.targets)

    def outer_loss(predict: Predict, hparams: TensorDict, own: Batch) -> Tensor:
        return objective.loss(predict(hparams["query"]), own.query.targets)

    num_tasks = len(episode.support.inputs)
    return Job(
        network=head,
        hparams=learner.init_hparams(),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        inner_batch=lambda _: episode.support,
        outer_batch=episode,
        num_steps=num_steps,
        lr=lr,
        num_tasks=num_tasks,
        context=features,
        own_problem=learner.problem(episode, num_tasks),
        stated=Stated(
            network=stated_network[0],
            network_settings=stated_network[1],
            losses="hyper_representation",
            data=_tensors(episode),
        ),
    )


def _tensors(episode: Episode) -> TensorDict:
    return {
        "support_inputs": episode.support.inputs,
        "support_targets": episode.support.targets,
        "query_inputs": episode.query.inputs,
        "query_targets": episode.query.targets,
    }
