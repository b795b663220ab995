"""Learners for domains never seen: transformations of features, and which episodes train, judge and test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.models.transformed_learner import TransformedLearner, episodes_at, with_transformations
from experiments.cross_domain import CrossDomain, EpisodeTraining, OtherEpisodes
from hypertorch.fewshot import Conv4, EpisodeSampler, ImageClasses, ProtoNet
from tests.experiments.built import built
from tests.experiments.commands import Command

WAY = 3


def sampler(seed: int = 0, num_tasks: int = 1) -> EpisodeSampler:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5 * 6, 1, 8, 8), generator=generator, dtype=torch.uint8)
    classes = ImageClasses(images=images, counts=(6,) * 5, class_names=tuple("abcde"))
    return EpisodeSampler(classes, way=WAY, shot=2, num_queries=2, num_tasks=num_tasks, seed=seed, dtype=torch.float64)


def network() -> Conv4:
    torch.manual_seed(0)
    return Conv4(hidden=3, downsample="stride", image_size=8).double()


def learner() -> TransformedLearner:
    return TransformedLearner(ProtoNet(with_transformations(network()).double(), way=WAY))


def test_without_transformations_it_is_the_librarys_prototypical_network() -> None:
    smooth = network()
    for block in smooth.blocks[:4]:
        block.relu = nn.SiLU()
    plain, own = ProtoNet(smooth, way=WAY), learner()
    judged = ht.evaluate(plain.on(sampler(num_tasks=4)), plain.init_hparams(), num_episodes=4)
    outputs, labels = own.answers(own.first_weights, episodes_at(sampler(num_tasks=4), 0))
    assert float(F.cross_entropy(outputs, labels)) == pytest.approx(judged.metrics["outer_loss"].mean)
    # The layers are none of the weights that are trained.
    assert len(own.first_weights) == len(plain.init_hparams()) == 4 * 3


def test_features_are_scaled_and_shifted_after_every_norm() -> None:
    own = learner()
    torch.manual_seed(1)
    hparams = {name: torch.randn_like(value) for name, value in own.noise_of(0.0, 0.0).items()}
    drawn = own.draw(7, 1)
    assert all(torch.equal(value, own.draw(7, 1)[name]) for name, value in drawn.items())
    assert not torch.equal(drawn["layer1.beta"], own.draw(7, 2)["layer1.beta"])
    (episode,) = episodes_at(sampler(), 0)
    features = torch.cat([episode.support.inputs, episode.query.inputs])
    for index, block in enumerate(network().blocks[:4]):
        features = F.conv2d(features, block.get_submodule("conv").weight, stride=2, padding=1)  # type: ignore[arg-type]
        features = F.batch_norm(features, None, None, training=True)
        gamma, beta = f"layer{index + 1}.gamma", f"layer{index + 1}.beta"
        scale = 1.0 + (1.0 + hparams[gamma].exp()).log() * drawn[gamma]
        shift = (1.0 + hparams[beta].exp()).log() * drawn[beta]
        features = F.silu(scale[:, None, None] * features + shift[:, None, None])
    support, query = features.flatten(1).split([len(episode.support.inputs), len(episode.query.inputs)])
    prototypes = torch.stack([support[episode.support.targets == label].mean(dim=0) for label in range(WAY)])
    expected = -torch.cdist(query, prototypes).square()
    outputs, labels = own.answers(own.disturbed(own.first_weights, hparams, drawn), (episode,))
    torch.testing.assert_close(outputs, expected)
    assert torch.equal(labels, episode.query.targets)


def test_the_hypergradient_is_right() -> None:
    own = learner()
    problem = ht.BilevelProblem(
        EpisodeTraining(
            learner=own, episodes=lambda step: episodes_at(sampler(1), step), first=own.first_weights, seed=3
        ),
        OtherEpisodes(learner=own, episodes=lambda step: episodes_at(sampler(2, num_tasks=2), step)),
        dynamics=ht.dynamics.SGD(lr=0.1, momentum=0.9),
        num_steps=2,
    )
    assert ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse()).passed
    # A draw and its negative count the same.
    loss, (episodes, drawn) = problem.inner.loss, problem.inner.batch(0)
    opposite = {name: -value for name, value in drawn.items()}
    one, other = (loss(own.first_weights, problem.init_hparams(), (episodes, one)) for one in (drawn, opposite))
    torch.testing.assert_close(one, other)


def small_experiment(*overrides: str) -> CrossDomain:
    return built(CrossDomain, "experiment=cross_domain", "experiment.every=4", *overrides)


def test_no_step_trains_on_what_it_is_judged_on_or_what_is_held_out() -> None:
    own = small_experiment()
    assert own.splits == ("validation", "strokes", "inverted", "blurred", "digits")
    images = {
        name: {bytes(image) for image in domain["meta_train"].images.flatten(1).numpy()}
        for name, domain in own._domains.items()
    }

    def domain_of(episodes: tuple) -> str:
        pixels = [
            (255 * part.inputs).round().to(torch.uint8).flatten(1) for episode in episodes for part in episode
        ]  # fmt: skip
        found = {name for name in images for part in pixels for image in part if bytes(image.numpy()) in images[name]}
        assert len(found) == 1
        return found.pop()

    judged = []
    for outer_step in range(6):
        judged.append(domain_of(own._unseen_episodes(outer_step)))
        trained = {domain_of(own._seen_episodes(4 * outer_step + step)) for step in range(4)}
        assert trained == {"strokes", "inverted", "blurred"} - {judged[-1]}
    assert len(set(judged)) > 1 and "digits" not in judged
    assert len(own._unseen_episodes(0)) == 4


def test_a_small_run_leaves_figures_and_a_picture(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    small = (
        "experiment=cross_domain", "outer_loop.progress=false", "outer_loop.num_outer_steps=2", "experiment.every=2",
        "experiment.num_pretraining=2", "experiment.hidden=4", "evaluation.num_episodes=4",
    )  # fmt: skip
    code, error = command(*small, f"paths.run_dir={folder}")
    assert code == 0, error
    results = json.loads((folder / "results.json").read_text())
    assert set(results["baselines"]) == {"no layers", "fixed layers", "learnt layers, trained anew"}
    fixed = results["baselines"]["fixed layers"]["digits"]
    assert fixed["scale_spread"]["mean"] == pytest.approx(0.8544, abs=1e-4)
    assert fixed["shift_spread"]["mean"] == pytest.approx(0.9741, abs=1e-4)
    assert results["baselines"]["no layers"]["digits"]["scale_spread"]["mean"] == pytest.approx(0.0, abs=1e-12)
    assert (folder / "domains.png").stat().st_size > 0
    for word, message in (
        ("experiment.held_out=letters", "`experiment.held_out` is 'letters'"),
        ("experiment.domains=[strokes,digits]", "two others are needed"),
    ):
        code, error = command(*small, word, f"paths.run_dir={tmp_path / 'none'}")
        assert code == 1 and message in error


def test_a_finished_run_cannot_be_judged_by_its_scales_alone() -> None:
    with pytest.raises(ExpectedFailure, match="cannot be made of the outer variables alone"):
        small_experiment().evaluation("digits")
