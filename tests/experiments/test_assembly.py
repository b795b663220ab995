"""What a run is made of: its streams of episodes."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import experiments.common.resolvers  # noqa: F401
from experiments.assembly import EpisodeStreams, check_outer_updates
from experiments.common.config_errors import CONFIGS
from experiments.common.failures import ExpectedFailure
from experiments.common.settings import SPLITS
from hypertorch.fewshot import EpisodeSource


def configured(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def streams_of(config: DictConfig) -> dict[str, EpisodeSource]:
    streams = EpisodeStreams(config=config)
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
    other = EpisodeStreams(config=config).evaluation("meta_test", seed + 1).at(0).query.inputs
    theirs = streams_of(configured("experiment=sinusoid", f"seed={seed + 1}"))["meta_test"].at(0).query.inputs
    assert torch.equal(other, theirs) and not torch.equal(other, first["meta_test"].at(0).query.inputs)


STEP_LR = "+outer_loop.scheduler._target_=torch.optim.lr_scheduler.StepLR"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (
            ["outer_optimizer.lr=1e39"],
            r"`outer_optimizer.lr` is 1e\+39, which PyTorch refuses.*Give outer_optimizer.lr=",
        ),
        (["outer_optimizer.lr=inf"], r"`outer_optimizer.lr` is inf, with which the first steps lead from 0 to"),
        (["outer_optimizer.weight_decay=inf"], r"`outer_optimizer.weight_decay` is inf, "),
        (["outer_optimizer=sgd", "outer_optimizer.momentum=1e39"], r"`outer_optimizer.momentum` is 1e\+39, "),
        (
            ["outer_loop.scheduler.step_size=1", "outer_loop.scheduler.gamma=1e60"],
            r"`outer_loop.scheduler.gamma` is 1e\+60, ",
        ),
        (
            ["outer_loop.scheduler.step_size=0", "outer_loop.scheduler.gamma=0.5"],
            r"`outer_loop.scheduler.step_size` is 0",
        ),
    ],
)
def test_what_leaves_the_range_of_the_numbers_is_told_by_its_key(overrides: list[str], key: str) -> None:
    added = [word if "=" not in word or word.startswith("outer_optimizer=") else f"++{word}" for word in overrides]
    scheduler = [STEP_LR, "+outer_loop.scheduler._partial_=true"] if "scheduler" in overrides[0] else []
    with pytest.raises(ExpectedFailure, match=key):
        check_outer_updates(configured("experiment=sinusoid", *scheduler, *added))


def test_double_precision_holds_more() -> None:
    check_outer_updates(configured("experiment=sinusoid", "outer_optimizer.lr=1e39", "dtype=float64"))
