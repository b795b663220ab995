"""A training run as a trial of a search: what it reports, and what the search must know of the command."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure, is_trial
from experiments.common.configuration.reads import given_settings
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.runs.experiment import Experiment, build_experiment
from experiments.common.runs.run_folder import changed_settings
from experiments.common.runs.training import is_scheduled
from hypertorch.search import SearchedCommand
from hypertorch.search.command import Direction

VALIDATION, SECONDS = "validation", "seconds"
# Where and how a trial runs, not what is computed.
_FREE = ("paths.", "device=", "threads=", "outer_loop.progress=", "dataset.root=", "experiment.root=")
# What decides on what trials are validated, and why trials that differ in it cannot be compared by that.
_JUDGES = {
    "validation": "a trial with more validations would win as the best of more, one with fewer episodes by luck",
    "evaluation.num_queries": "it is that of the validation too",
    "experiment": "their validations measure different things",
    "dataset": "they would be validated on different data",
    "fewshot": "their validations measure different things",
    "debug": "it changes how often and on how much a trial is validated",
    "task.way": "the task that they are validated on would be another",
    "task.shot": "the task that they are validated on would be another",
    "task.num_queries": "the task that they are validated on would be another",
    "episodes.way": "the task that they are validated on would be another",
    "episodes.shot": "the task that they are validated on would be another",
}
# Groups whose single settings are the trials' own.
_GROUPS = ("experiment", "dataset", "fewshot", "debug")
# Launchers whose jobs run on this machine.
_HERE = ("basic_launcher", "joblib")


def objectives_of_trial() -> list[str] | None:
    """Returns what the current Hydra job reports to a search; None if it is no trial of one."""
    return list(HydraConfig.get().sweeper.objectives) if is_trial() else None


def values_of_trial(objectives: Sequence[str], trained: ht.Trained, cpu_seconds: float) -> float | list[float]:
    """Returns what a trial returns: a number, or a list where there are several objectives.

    Args:
        objectives: their names.
        trained: what the run found.
        cpu_seconds: of the training.
    """
    # Without a best value every validation was NaN.
    best = math.nan if trained.best_value is None else trained.best_value
    values = {VALIDATION: best, SECONDS: cpu_seconds}
    found = [values[name] for name in objectives]
    return found if len(found) > 1 else found[0]


class SearchedTraining(SearchedCommand):
    """The training command, as the sweeper sees it.

    Args:
        prepare: builds everything that a run needs before its first step, and returns the experiment.
    """

    program = "scripts/train"

    def __init__(self, prepare: Callable[[DictConfig], Experiment]) -> None:
        self._prepare = prepare

    def check(self, config: DictConfig) -> Mapping[str, Direction]:
        """Returns the objectives, after building everything that a trial needs before its first step.

        Raises:
            ExpectedFailure: if a setting would be refused, or has no place in a search.
        """
        for name in given_settings(config):
            if name in ("evaluation.splits", "evaluation.num_episodes"):
                raise ExpectedFailure(
                    f"`{name}` is given, but the trials of a search are not judged: they are compared by their "
                    "validation, so that the test stays unseen. Leave it out, and add it to the command that is "
                    "printed at the end."
                )
            if name in ("resume", "paths.run_dir"):
                raise ExpectedFailure(
                    f"`{name}` is given, but a search goes on by itself where its folder or storage is named, and "
                    "gives each trial a folder. Leave it out; paths.sweep_dir=... names the folder of the search."
                )
        launcher = str(HydraConfig.get().launcher._target_)
        if not any(name in launcher for name in _HERE):
            with open_dict(config):  # this machine may lack the GPU of those that run the trials
                config.device = "cpu"
        return {VALIDATION: self._prepare(config).mode, SECONDS: "min"}

    def check_searched(self, names: Sequence[str]) -> None:
        """Checks that no setting is searched that decides on what trials are validated.

        Raises:
            ExpectedFailure: if one is.
        """
        for name in names:
            setting = name.lstrip("+")
            for judge, why in _JUDGES.items():
                if setting == judge or (judge not in _GROUPS and setting.startswith(f"{judge}.")):
                    raise ExpectedFailure(
                        f"`{setting}` has several values, but trials are compared by their validation: {why}. Give it "
                        "one value for all trials, and run one search for each of the others."
                    )

    def length(self, config: DictConfig) -> int:
        """Returns the length of a run (unit: outer steps)."""
        return config.outer_loop.num_outer_steps

    def lengthened(self, config: DictConfig, num_steps: int) -> list[str]:
        """Returns the overrides with which a run ends at a rung, its schedule being that of the whole run."""
        words = [f"outer_loop.num_outer_steps={num_steps}"]
        if is_scheduled(config):
            words.append(f"outer_loop.schedule_length={config.outer_loop.schedule_length}")
        return words

    def check_rungs(self, rungs: Sequence[DictConfig]) -> None:
        """Checks that a run that is lengthened from rung to rung ends as one that runs straight.

        Raises:
            ExpectedFailure: if its settings would change, it would be validated at other steps, or the way its tasks
                are
                run is measured anew for each run.
        """
        for config in rungs:
            steps, every = config.outer_loop.num_outer_steps, config.validation.every
            if steps % every != 0:
                raise ExpectedFailure(
                    f"`validation.every` is {every}, but a rung of the search ends after {steps} outer steps: it "
                    "would be validated there beside, and a run that goes on would differ from a straight one. Write "
                    f"validation.every={math.gcd(*(one.outer_loop.num_outer_steps for one in rungs))}, or choose other "
                    "rungs by hydra.sweeper.min_steps."
                )
        changed = changed_settings(rungs[0], rungs[-1])
        if changed:
            raise ExpectedFailure(
                f"`{changed[0]}` depends on `outer_loop.num_outer_steps`, which grows from rung to rung: a run cannot "
                f"go on with another value. Give {changed[0]}=... a number, or search without a pruner."
            )
        problem = build_experiment(rungs[-1], parse(TrainSettings, rungs[-1])).training().at(0)
        if problem.num_tasks is not None and rungs[-1].execution.tasks == "auto":
            raise ExpectedFailure(
                "`execution.tasks` is 'auto', which is measured: two runs of the same settings may differ in their "
                "last bits, so trials that go on would not be comparable. Write execution.tasks=vmap or "
                "execution.tasks=loop."
            )

    def continued(self, objectives: Sequence[str]) -> list[str] | None:
        """Returns `resume=true`; None with the CPU time among the objectives, which a resumed run does not know."""
        return None if SECONDS in objectives else ["resume=true"]

    def seeded(self, config: DictConfig, index: int) -> list[str]:
        """Returns the override of the seed, which counts up from that of the command."""
        return [f"seed={config.seed + index}"]

    def identifying(self, overrides: Sequence[str]) -> list[str]:
        """Returns the overrides that say what is computed."""
        return [word for word in overrides if not word.lstrip("+").startswith(_FREE)]
