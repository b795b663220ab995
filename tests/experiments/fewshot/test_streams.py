"""What a run is made of: its streams of episodes."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import experiments.common.runs.resolvers  # noqa: F401
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.configuration.settings import ProblemSettings
from experiments.common.configuration.typed_settings import parse
from experiments.fewshot.settings import SPLITS, FewShotSettings
from experiments.fewshot.streams import EpisodeStreams
from hypertorch.fewshot import EpisodeSource


def configured(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def made(config: DictConfig) -> EpisodeStreams:
    return EpisodeStreams(config=config, settings=parse(ProblemSettings, config), own=parse(FewShotSettings, config))


def streams_of(config: DictConfig) -> dict[str, EpisodeSource]:
    streams = made(config)
    return {
        "training": streams.training(),
        "validation": streams.validation(),
        **{split: streams.evaluation(split) for split in SPLITS},
    }


def test_no_two_streams_of_any_two_runs_are_the_same() -> None:
    config = configured("experiment=sinusoid", "evaluation.num_queries=10", "episodes.num_tasks=2")
    found: dict[tuple[int, str], EpisodeSource] = {}
    for seed in range(6):
        config.seed = seed
        found |= {(seed, purpose): stream for purpose, stream in streams_of(config).items()}
    assert len(found) == 30
    episodes = {key: stream.at(0).query.inputs for key, stream in found.items()}
    for first, second in combinations(found, 2):
        assert not torch.equal(episodes[first], episodes[second]), (first, second)
        # Not the same episodes at other steps either.
        assert not torch.equal(episodes[first], found[second].at(1).query.inputs), (first, second)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_same_seed_is_the_same_stream_and_evaluation_takes_another(seed: int) -> None:
    config = configured("experiment=sinusoid", f"seed={seed}")
    first, again = streams_of(config), streams_of(configured("experiment=sinusoid", f"seed={seed}"))
    for purpose, stream in first.items():
        assert torch.equal(stream.at(2).query.inputs, again[purpose].at(2).query.inputs)
    other = made(config).evaluation("meta_test", seed + 1).at(0).query.inputs
    theirs = streams_of(configured("experiment=sinusoid", f"seed={seed + 1}"))["meta_test"].at(0).query.inputs
    assert torch.equal(other, theirs) and not torch.equal(other, first["meta_test"].at(0).query.inputs)
