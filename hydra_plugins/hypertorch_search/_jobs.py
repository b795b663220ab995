"""Jobs of a search: their configurations, and what they returned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from hypertorch.search.command import FailedTrial

Outcome: TypeAlias = "list[float] | FailedTrial | BaseException"
"""The values of a trial, why it failed, or what stopped it that says nothing of its settings."""
Result = TypeVar("Result")


class Jobs:
    """What composes configurations of a command and launches them.

    Args:
        config: that of the command, with Hydra's part.
        context: Hydra's.
        launcher: Hydra's.
        fixed: the overrides that all jobs have.
        folder: of the sweep.
        num_objectives: how many values a job returns.
    """

    def __init__(
        self,
        config: DictConfig,
        context: HydraContext,
        launcher: Launcher,
        *,
        fixed: Sequence[str],
        folder: Path,
        num_objectives: int,
    ) -> None:
        self._config = config
        self._context = context
        self._launcher = launcher
        self._fixed = list(fixed)
        self._folder = folder
        self._num_objectives = num_objectives
        self._launched = 0

    def with_config(self, overrides: Sequence[str], use: Callable[[Any], Result], *, subfolder: str = "0") -> Result:
        """Returns what a function makes of the configuration of a job, called as the job would be.

        Args:
            overrides: of the job.
            use: takes the configuration.
            subfolder: of the job.
        """
        setup_globals()
        config = self._context.config_loader.load_sweep_config(self._config, self._words(overrides, subfolder))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = 0
            config.hydra.runtime.output_dir = str(self._folder / subfolder)
        with _hydra_config(config):
            task = copy.deepcopy(config)
            with open_dict(task):
                del task["hydra"]
            return use(task)

    def config(self, overrides: Sequence[str]) -> Any:
        """Returns the configuration of a job, without Hydra's part."""
        return self.with_config(overrides, lambda config: config)

    def launch(self, jobs: Sequence[tuple[str, Sequence[str]]]) -> list[Outcome]:
        """Returns what jobs returned.

        Args:
            jobs: subfolder and overrides of each.
        """
        words = [self._words(overrides, subfolder) for subfolder, overrides in jobs]
        returned = self._launcher.launch(words, initial_job_idx=self._launched)
        self._launched += len(words)
        return [_outcome(one, self._num_objectives) for one in returned]

    def _words(self, overrides: Sequence[str], subfolder: str) -> list[str]:
        # Also where the folder is another than that of the command: a study that goes on keeps its own.
        folder = str(self._folder).replace("\\", "\\\\").replace("'", "\\'")
        return [*self._fixed, *overrides, f"hydra.sweep.dir='{folder}'", f"hydra.sweep.subdir='{subfolder}'"]


@contextmanager
def _hydra_config(config: DictConfig) -> Iterator[None]:
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _outcome(returned: JobReturn, num_objectives: int) -> Outcome:
    if returned.status is not JobStatus.COMPLETED:
        error = returned._return_value
        return error if isinstance(error, BaseException) else RuntimeError(f"the job ended as {returned.status}")
    value = returned.return_value
    if isinstance(value, FailedTrial):
        return value
    if value is None:
        return FailedTrial(why="it returned no value")
    values = [float(one) for one in (value if isinstance(value, Sequence) else [value])]
    if len(values) != num_objectives:
        return FailedTrial(why=f"it returned {len(values)} values for {num_objectives} objectives")
    if not all(map(math.isfinite, values)):
        return FailedTrial(why=f"its value is {', '.join(map(str, values))}")
    return values
