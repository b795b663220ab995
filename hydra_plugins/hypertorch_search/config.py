"""The settings of the sweeper, `hydra.sweeper.NAME=...` on the command line."""

# Hydra runs this file before Python knows the module, in which a dataclass would look up annotations that are strings.
from dataclasses import dataclass, field
from typing import Any, List, Optional  # noqa: UP035 (OmegaConf reads the annotations)

from hydra.core.config_store import ConfigStore

TARGET = "hydra_plugins.hypertorch_search.sweeper.SearchSweeper"


@dataclass
class SearchConfig:
    """The settings of a search.

    The tables are of no type, because OmegaConf takes no new entries for one on the command line.

    Args:
        _target_: the sweeper.
        sampler: random, grid, qmc, tpe, gp, cmaes, nsga2 or observer.
        settings: further arguments of the sampler's class in Optuna.
        num_trials: trials of the study in all; None for grid and Hyperband, which have a number of their own.
        n_jobs: trials that are drawn together and handed to Hydra's launcher as one batch.
        seed: of the sampler.
        objectives: what the trials report; several for nsga2 and others that take them.
        directions: "max" or "min" for each objective; None where the command says it.
        params: settings to search in the form of the command line, for files of settings.
        conditions: by the name of a setting that is searched: `other=value`, or `other=value,value`, without which it
            is left out.
        starts: points to begin with, each a table of settings that are searched; those it leaves out are drawn.
        storage: file of a journal, `memory`, or the URL of a database; None for `study.journal` in the sweep's folder.
        study_name: of the study in the storage.
        pruner: successive_halving or hyperband, which end trials early; None for neither.
        min_steps: the first rung of the pruner (unit: outer steps); the last is the length of the run.
        eta: the reduction of the pruner: one in `eta` trials goes on, `eta` times as far; None for 3.
        seeds: runs of each trial with seeds of their own, whose mean is the objective.
        racing: whether a trial that is significantly worse than the best runs no further seeds.
    """

    _target_: str = TARGET
    sampler: str = "tpe"
    settings: Any = None
    num_trials: Optional[int] = None  # noqa: UP045
    n_jobs: int = 1
    seed: int = 0
    objectives: List[str] = field(default_factory=lambda: ["validation"])  # noqa: UP006
    directions: Optional[List[str]] = None  # noqa: UP006, UP045
    params: Any = None
    conditions: Any = None
    starts: Any = None
    storage: Optional[str] = None  # noqa: UP045
    study_name: str = "search"
    pruner: Optional[str] = None  # noqa: UP045
    min_steps: Optional[int] = None  # noqa: UP045
    eta: Optional[int] = None  # noqa: UP045
    seeds: int = 1
    racing: bool = False


ConfigStore.instance().store(group="hydra/sweeper", name="search", node=SearchConfig, provider="hypertorch")
