"""What an experiment is: a source of problems, what its outcome is judged on, and its pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from omegaconf import DictConfig

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build, make
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.settings import ProblemSettings, TrainSettings
from experiments.common.runs.seeds import Purpose, run_seed
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What the outcome of an experiment is compared with.

    Args:
        source: the problems that it is judged on.
        hparams: its outer variables, which were not learnt.
    """

    source: ht.ProblemSource
    hparams: TensorDict


class Experiment(ABC):
    """One experiment: a Python file with a subclass, and a YAML file in `configs/experiment` that names it.

    The keyword arguments of the subclass are the settings of its block, `experiment.NAME=...` on the command line. What
    other groups of the configuration describe, such as `dynamics`, it builds by `build`, and lists in `READS`.

    Args:
        config: the whole configuration, for the groups.
        settings: the plain settings that all experiments have.

    Attributes:
        READS: what it reads beside its own block.
        splits: names of what the outcome is judged on, in the order of the table; the last is the test.
        metric: the figure that validation goes by.
        mode: whether more ("max") or less ("min") of it is better.
        published: what others report of this experiment, by what it is, with its source: shown under the table.
        training_cpu_seconds: what training took, so that baselines can be given as much; the command sets it before it
            asks for them. None if it is not known: before training, and in a run that was resumed.
    """

    READS: ClassVar[Reads] = Reads()
    splits: tuple[str, ...]
    metric: str
    mode: Literal["max", "min"]
    published: ClassVar[Mapping[str, str]] = {}
    training_cpu_seconds: float | None = None

    def __init__(self, config: DictConfig, settings: ProblemSettings) -> None:
        self.config = config
        self.settings = settings

    @abstractmethod
    def training(self) -> ht.ProblemSource:
        """Returns the problems to learn from."""

    @abstractmethod
    def validation(self) -> ht.ProblemSource:
        """Returns the problems that choose the best outer variables of a run."""

    @abstractmethod
    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the problems of the final evaluation on a split.

        Args:
            split: one of `splits`.
            seed: chooses other problems than those of the run, where there are others; None for those.
        """

    def reseeded(
        self, purpose: Purpose, problem: Callable[[int], ht.BilevelProblem], *, seed: int | None = None
    ) -> ht.ProblemSource:
        """Returns problems of which every outer step has one with a seed of its own.

        Args:
            purpose: what they are for: runs for different purposes have different seeds.
            problem: from its seed to the problem.
            seed: chooses other problems than those of the run; None for those.
        """
        start = self.settings.seed if seed is None else seed
        return ht.Problems(lambda outer_step: problem(run_seed(start, purpose, outer_step)))

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns what the outcome on a split is compared with, by name; nothing unless overridden."""
        return {}

    def check_training(self, settings: TrainSettings) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuses settings of a training run that do not fit the experiment; takes all unless overridden.

        Raises:
            ExpectedFailure: naming the setting, its value and what to write instead.
        """

    def after(self, trained: ht.Trained) -> Experiment:
        """Returns the experiment that is judged and drawn after a run; this one unless overridden.

        An experiment whose outcome is the inner state that a warm-started run ends at takes it from `trained.params`.

        Args:
            trained: what the run found.
        """
        return self

    def pictures(self, hparams: TensorDict) -> TensorDict:
        """Returns images of outer variables for TensorBoard, by name, while a run goes on; none unless overridden.

        Args:
            hparams: the outer variables.

        Returns:
            Images of shape `(1 or 3, height, width)`, entries from 0 to 1.
        """
        return {}

    def draw(self, hparams: TensorDict, folder: Path) -> None:  # noqa: B027 (some have no pictures)
        """Writes pictures of what was learnt; none unless overridden.

        Args:
            hparams: the best outer variables.
            folder: where to.
        """

    def evaluated_splits(self, chosen: list[str] | None) -> tuple[str, ...]:
        """Returns the splits that `evaluation.splits` lists, in the experiment's order; all where it is null.

        Raises:
            ExpectedFailure: if it lists another.
        """
        for name in chosen or ():
            if name not in self.splits:
                raise ExpectedFailure(
                    f"`evaluation.splits` lists {name!r}, which is no split. Use some of: {', '.join(self.splits)}."
                )
        return tuple(split for split in self.splits if chosen is None or split in chosen)


def experiment_class(config: DictConfig) -> type[Experiment]:
    """Returns the class that the block `experiment` of a configuration names.

    Raises:
        ExpectedFailure: if it names none, or what is no experiment.
    """
    found = make(config, "experiment").func
    if not (isinstance(found, type) and issubclass(found, Experiment)):
        raise ExpectedFailure(
            f"`experiment._target_` is {config.experiment['_target_']!r}, which is no experiment: it has no "
            "problems to learn from. Name a subclass of experiments.common.runs.experiment.Experiment."
        )
    return found


def build_experiment(config: DictConfig, settings: ProblemSettings) -> Experiment:
    """Returns the experiment that a configuration describes.

    Args:
        config: the configuration.
        settings: the plain settings, parsed from it.

    Raises:
        ExpectedFailure: if a setting has a value that the experiment cannot work with.
    """
    experiment_class(config)
    return build(config, "experiment", config, settings)


def refuse_other_problems(seed: int | None) -> None:
    """Refuses a seed for the evaluation of an experiment that has one problem for each split.

    Raises:
        ExpectedFailure: if one is given.
    """
    if seed is not None:
        raise ExpectedFailure(
            f"`seed` is {seed}, but this experiment has one problem for each split: there are no others to choose. "
            "Leave it out."
        )


def refuse_other_length(settings: TrainSettings, num_updates: int) -> None:
    """Refuses a run of another length than its baselines are trained for.

    Raises:
        ExpectedFailure: naming both.
    """
    if settings.outer_loop.num_outer_steps != num_updates:
        raise ExpectedFailure(
            f"`experiment.num_updates` is {num_updates}, but `outer_loop.num_outer_steps` is "
            f"{settings.outer_loop.num_outer_steps}: what the run is compared with would be trained for another "
            "length. Leave experiment.num_updates out."
        )


def check_repetitions(source: ht.ProblemSource, num_episodes: int, key: str) -> None:
    """Refuses to judge on the same single problem several times: the interval would be that of repetitions.

    Args:
        source: the problems.
        num_episodes: how many are asked for.
        key: the setting that says so.

    Raises:
        ExpectedFailure: if they are all the same.
    """
    if isinstance(source, ht.BilevelProblem) and source.num_tasks is None and num_episodes > 1:
        raise ExpectedFailure(
            f"`{key}` is {num_episodes}, but this experiment judges on one problem, the same every time: the interval "
            f"would be that of repetitions. Write {key}=1."
        )
