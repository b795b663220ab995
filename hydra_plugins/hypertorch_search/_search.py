"""A search: what it is made of and checked for before its first trial, and the summary after the last."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna.samplers import BaseSampler
from rich.console import Console

from hydra_plugins.hypertorch_search._jobs import Jobs
from hydra_plugins.hypertorch_search._settings import check_settings, check_tables
from hydra_plugins.hypertorch_search._space import described, overrides_of, read_space
from hydra_plugins.hypertorch_search._study import (
    Studied,
    begin,
    folder_of,
    open_storage,
    open_study,
    seed_of,
    storage_shown,
)
from hydra_plugins.hypertorch_search._summary import Summary
from hydra_plugins.hypertorch_search._trials import Trials
from hydra_plugins.hypertorch_search.config import SearchConfig
from hypertorch.search.command import Direction, command_of
from hypertorch.search.halving import Bracket, hyperband, successive_halving
from hypertorch.search.processes import Process
from hypertorch.search.samplers import build_sampler

_ETA = 3
# Where a sweep's folder is named on the command line.
_NAMES_FOLDER = ("paths.sweep_dir=", "hydra.sweep.dir=")


class Search:
    """One process's part of a search.

    Args:
        settings: the fields of `SearchConfig`.
        config: the configuration of the command, with Hydra's part.
        context: Hydra's.
        task: the function that is run for each trial.
        launcher: Hydra's.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        config: DictConfig,
        context: HydraContext,
        task: TaskFunction,
        launcher: Launcher,
    ) -> None:
        self.settings = SearchConfig(**settings)
        self.config = config
        self.context = context
        self.launcher = launcher
        self.command = command_of(task)
        self.console = Console()

    def run(self, arguments: Sequence[str]) -> None:
        """Runs trials until the study has as many as it is to have, and shows what it found.

        Args:
            arguments: the settings of the command line, without Hydra's.

        Raises:
            ValueError: if a setting of the search or a trial would be refused, or no trial had a value.
        """
        settings = self.settings
        check_tables(settings)
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        listed = [*(f"{name}={value}" for name, value in (settings.params or {}).items()), *arguments]
        overrides = {item.get_key_element(): item for item in parser.parse_overrides(listed)}
        swept = [item for item in overrides.values() if item.is_sweep_override()]
        fixed = [str(item.input_line) for item in overrides.values() if not item.is_sweep_override()]
        self.fixed = [word for word in fixed if not word.startswith(_NAMES_FOLDER)]
        self.space = read_space(swept, settings.conditions or {})
        check_settings(settings, self.space)
        # What a study cannot be begun with is refused before there is one.
        self.grid = self.space.grid() if settings.sampler == "grid" else []
        self.starts = [self.space.start(table) for table in settings.starts or ()]
        self._sampler(settings.seed)
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        self.jobs = self._jobs(folder)
        self.directions = self._check_trials()
        self._check_searched()
        self.brackets = self._brackets()
        storage = open_storage(settings.storage, folder)
        study, is_new = open_study(storage, settings.study_name, self.directions, self._record())
        given = (*self.config.hydra.overrides.task, *self.config.hydra.overrides.hydra)
        folder = folder_of(study, folder, is_named=any(word.startswith(_NAMES_FOLDER) for word in given))
        self._open_folder(folder, is_new=is_new)
        begin(study, self.directions, self._record())
        with Process(storage, storage.get_study_id_from_name(settings.study_name)) as process:
            self.studied = Studied(study, storage, process, self.space)
            study.sampler = self._sampler(seed_of(settings.seed, process))
            try:
                self.studied.enqueue(self.grid or self.starts)
                Trials(
                    settings,
                    self.command,
                    self.jobs,
                    self.studied,
                    directions=self.directions,
                    brackets=self.brackets,
                    console=self.console,
                ).run(process)
            except KeyboardInterrupt as interrupt:
                raise KeyboardInterrupt(
                    "interrupted. The study was in memory and is lost; the runs of its trials are kept."
                    if settings.storage == "memory"
                    else "interrupted. What was found so far is kept; the same command with "
                    f"paths.sweep_dir={folder} goes on from there."
                ) from interrupt
        self._summary(storage_shown(settings.storage, folder), folder).show()

    # What is known before the first trial.

    def _sampler(self, seed: int) -> BaseSampler:
        settings = self.settings
        return build_sampler(
            settings.sampler,
            self.space.distributions,
            seed=seed,
            settings=settings.settings or {},
            batch=settings.n_jobs,
        )

    def _jobs(self, folder: Path) -> Jobs:
        return Jobs(
            self.config,
            self.context,
            self.launcher,
            fixed=self.fixed,
            folder=folder,
            num_objectives=len(self.settings.objectives),
        )

    def _check_trials(self) -> list[Direction]:
        """Returns the direction of each objective, after checking every end of the space."""
        names, given = self.settings.objectives, self.settings.directions
        found: dict[tuple[Direction, ...], list[str]] = {}
        for point in self.space.ends():
            overrides = overrides_of(point)
            if self.command is None:
                self.jobs.with_config(overrides, bool)
                continue
            known = self.jobs.with_config(overrides, self.command.check)
            missing = [name for name in names if name not in known]
            if missing:
                raise ValueError(
                    f"`hydra.sweeper.objectives` lists {missing[0]!r}, which the trials do not report. Use some of: "
                    f"{', '.join(known)}."
                )
            better: list[Direction] = [known[name] for name in names]
            found[tuple(better)] = overrides
        if len(found) > 1:
            (first, where), (second, other) = list(found.items())[:2]
            raise ValueError(
                f"`hydra.sweeper.objectives` is {names}, which is better {first} with {' '.join(where)} and {second} "
                f"with {' '.join(other)}: no study can compare them. Search each of them alone."
            )
        if not found and given is None:
            raise ValueError(
                "`hydra.sweeper.directions` is not given, and this command does not say what is better: a search could "
                "go the wrong way. Write hydra.sweeper.directions=[max] or [min]."
            )
        directions: list[Direction] = list(next(iter(found))) if found else [_direction(word) for word in given or ()]
        if given is not None and list(given) != list(directions):
            raise ValueError(
                f"`hydra.sweeper.directions` is {given}, but of {', '.join(names)} the experiment says {directions} is "
                "better: the search would look for the worst. Leave it out."
            )
        return directions

    def _check_searched(self) -> None:
        """Checks that trials can be compared, and that each has the same seeds."""
        if self.command is None:
            return
        names = list(self.space.distributions)
        self.command.check_searched(names)
        for word in self._seed_words(0) if self.settings.seeds > 1 else ():
            seed = word.partition("=")[0].lstrip("+")
            if seed in {name.lstrip("+") for name in names}:
                raise ValueError(
                    f"`{seed}` has several values, and `hydra.sweeper.seeds` is {self.settings.seeds}, which counts up "
                    f"from each of them: trials would be compared over different seeds. Give {seed} one value, or "
                    "leave hydra.sweeper.seeds out."
                )

    def _seed_words(self, index: int) -> list[str]:
        """Returns the overrides of a repetition where the seed is not searched."""
        point = overrides_of(self.space.ends()[0])
        return self.jobs.with_config(
            point, lambda config: [] if self.command is None else self.command.seeded(config, index)
        )

    def _brackets(self) -> list[Bracket]:
        """Returns what successive halving or Hyperband runs; nothing without a pruner."""
        settings = self.settings
        if settings.pruner is None or settings.min_steps is None:
            return []
        if self.command is None:
            raise ValueError(
                f"`hydra.sweeper.pruner` is {settings.pruner!r}, but this command does not say how a trial goes on. "
                "Leave it out, or attach a `hypertorch.search.SearchedCommand`."
            )
        point = overrides_of(self.space.ends()[0])
        eta, longest = settings.eta or _ETA, self.jobs.with_config(point, self.command.length)
        if settings.pruner == "hyperband":
            brackets = hyperband(settings.min_steps, longest, eta)
        else:
            brackets = [successive_halving(settings.num_trials or 1, settings.min_steps, longest, eta)]
        for point in self.space.ends():
            words = overrides_of(point)
            whole = self.jobs.config(words)
            rungs = [self.jobs.config([*words, *self.command.lengthened(whole, steps)]) for steps in brackets[0].steps]
            self.command.check_rungs(rungs)
        return brackets

    def _record(self) -> dict[str, Any]:
        settings = self.settings
        fixed = self.fixed if self.command is None else self.command.identifying(self.fixed)
        record = {**described(self.space), "command": sorted(fixed)}
        for name in ("objectives", "pruner", "min_steps", "eta", "seeds", "racing"):
            record[name] = getattr(settings, name)
        if settings.pruner == "successive_halving":
            record["num_trials"] = settings.num_trials
        return record

    def _open_folder(self, folder: Path, *, is_new: bool) -> None:
        if is_new and (folder / "0").exists():
            raise ValueError(
                f"`paths.sweep_dir` is {str(folder)!r}, where there are trials already, but their study is not in "
                "`hydra.sweeper.storage`: they would be lost. Name another folder, or the storage that has the study."
            )
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        with open_dict(self.config):  # launchers write there too
            self.config.hydra.sweep.dir = str(folder)
        self.jobs = self._jobs(folder)
        self.console.print(f"search in {folder}", highlight=False, soft_wrap=True)

    def _summary(self, storage: str, folder: Path) -> Summary:
        return Summary(
            studied=self.studied,
            objectives=self.settings.objectives,
            brackets=self.brackets,
            repetitions=[shlex.join(self._seed_words(index)) for index in range(1, self.settings.seeds)],
            program="" if self.command is None else self.command.program,
            fixed=self.fixed,
            resumed=[] if self.command is None or self.settings.seeds > 1 else self.command.continued(()) or [],
            storage=storage,
            study_name=self.settings.study_name,
            folder=folder,
            console=self.console,
        )


def _direction(word: str) -> Direction:
    return "max" if word == "max" else "min"
