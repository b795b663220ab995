"""The settings of few-shot learning that no class takes as an argument."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from omegaconf import DictConfig, OmegaConf

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.readers import as_given, one_of, text, whole_number
from experiments.common.configuration.typed_settings import setting

SPLITS = ("meta_train", "meta_val", "meta_test")


def class_splits(config: DictConfig, key: str) -> tuple[str, ...]:
    """Returns the splits whose classes are learned from, such as ("meta_train", "meta_val").

    Raises:
        ExpectedFailure: if they are unknown, or those of the test.
    """
    value = OmegaConf.select(config, key)
    names = value.split("+") if isinstance(value, str) else []
    if not names or not set(names) <= set(SPLITS) or len(set(names)) < len(names):
        raise ExpectedFailure(
            f"`{key}` is {value!r}, which names no classes to learn from. Use meta_train, or meta_train+meta_val for a "
            "last run."
        )
    if "meta_test" in names:
        raise ExpectedFailure(
            f"`{key}` is {value!r}: what is learned from the test classes says nothing of unseen ones. Use meta_train, "
            "or meta_train+meta_val for a last run."
        )
    return tuple(names)


@dataclass(frozen=True, kw_only=True)
class TrainingEpisodes:
    """Episodes to learn from, where they differ from those judged on.

    Args:
        way: classes; None for as many.
        shot: support examples per class; None for as many.
    """

    way: int | None = setting(as_given)
    shot: int | None = setting(as_given)


@dataclass(frozen=True, kw_only=True)
class JudgedEpisodes:
    """How the learner is validated and evaluated.

    Args:
        num_queries: queries per class.
        num_steps: inner steps; None for as many as in training.
        lr: inner learning rate; None for that of training.
    """

    num_queries: int = setting(as_given)
    num_steps: int | None = setting(as_given)
    lr: float | None = setting(as_given)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures of the adaptation within an episode.

    Args:
        num_episodes: episodes of each curve.
    """

    num_episodes: int = setting(
        partial(whole_number, minimum=2, purpose="a curve is a mean over episodes, with its spread")
    )


def _mode(config: DictConfig, key: str) -> Literal["max", "min"]:
    return "max" if one_of(config, key, ("max", "min")) == "max" else "min"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the data set says of its tasks.

    Args:
        metric: the figure that validation goes by.
        mode: whether more or less of it is better.
    """

    metric: str = setting(text)
    mode: Literal["max", "min"] = setting(_mode)


@dataclass(frozen=True, kw_only=True)
class FewShotSettings:
    """What few-shot learning reads beside the groups that it builds.

    Args:
        train_split: splits whose classes are learned from.
        training: episodes to learn from.
        evaluation: how the learner is judged.
        pictures: the pictures.
        task: what validation goes by.
    """

    train_split: tuple[str, ...] = setting(class_splits)
    training: TrainingEpisodes
    evaluation: JudgedEpisodes
    pictures: Pictures
    task: Task
