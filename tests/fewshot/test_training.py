"""Learners learn: short runs on real and drawn characters, judged on classes never seen."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import hypertorch as ht
from hypertorch.fewshot import MAML, Conv4, EpisodeSampler, HyperRepresentation, Learner, Omniglot, StrokeCharacters
from tests.helpers.data import real_data


def learner(name: str) -> Learner:
    torch.manual_seed(0)
    if name == "maml":
        network = Conv4(way=5, hidden=32, downsample="stride")
        return MAML(network, dynamics=ht.dynamics.SGD(lr=0.4), num_steps=1)
    return HyperRepresentation(Conv4(hidden=32, downsample="stride"), dynamics=ht.dynamics.SGD(lr=8.0), num_steps=5)


def accuracy(name: str, num_outer_steps: int, train: EpisodeSampler, test: EpisodeSampler) -> float:
    made = learner(name)
    loop = ht.OuterLoop(
        made.on(train), optimizer=partial(torch.optim.Adam, lr=2e-3), backend=ht.hypergradients.Reverse()
    )
    trained = loop.run(num_outer_steps=num_outer_steps)
    return ht.evaluate(made.on(test), trained.hparams, num_episodes=100).metrics["accuracy"].mean


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("name", "least"), [("maml", 0.80), ("hyper_representation", 0.87)])
def test_learns_omniglot(name: str, least: float) -> None:
    root = real_data("omniglot")
    sampler = partial(EpisodeSampler, way=5, shot=1, num_tasks=4)
    train = sampler(Omniglot(root, split="meta_train"), num_queries=5)
    test = sampler(Omniglot(root, split="meta_test"), num_queries=15, seed=1)
    assert accuracy(name, 600, train, test) >= least


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("maml", 0.75), ("hyper_representation", 0.80)])
def test_learns_stroke_characters(name: str, least: float) -> None:
    sampler = partial(EpisodeSampler, way=5, shot=1, num_tasks=4)
    train = sampler(StrokeCharacters(split="meta_train"), num_queries=5)
    test = sampler(StrokeCharacters(split="meta_test"), num_queries=15, seed=1)
    assert accuracy(name, 400, train, test) >= least
