"""What the optimizer of the outer variables and its scheduler refuse is told by the setting's key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import experiments.common.runs.resolvers  # noqa: F401
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.outer_updates import check_outer_updates


@pytest.fixture(autouse=True)
def _own_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def configured(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


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
        check_outer_updates(configured("experiment=sinusoid", *scheduler, *added), torch.float32)


def test_double_precision_holds_more() -> None:
    check_outer_updates(configured("experiment=sinusoid", "outer_optimizer.lr=1e39", "dtype=float64"), torch.float64)
