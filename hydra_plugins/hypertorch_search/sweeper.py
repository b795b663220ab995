"""What Hydra sees of the search; the search itself is imported when it runs."""

from __future__ import annotations

import importlib
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

_SEARCH = "hydra_plugins.hypertorch_search._search"


class SearchSweeper(Sweeper):
    """Searches the settings that the command line sweeps over, by a sampler of Optuna.

    Args:
        settings: the fields of `SearchConfig`.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._context: HydraContext | None = None
        self._task: TaskFunction | None = None
        self._launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Receives what Hydra knows when it has read the command line."""
        self.config = config
        self._context = hydra_context
        self._task = task_function
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs the search.

        Args:
            arguments: the settings of the command line, those that are searched among them.

        Raises:
            ValueError: if a setting of the search or a trial would be refused, or no trial had a value.
            ImportError: if a package of the extra `search` is not installed.
        """
        try:
            module = importlib.import_module(_SEARCH)
        except ModuleNotFoundError as error:
            if str(error.name).startswith(("hypertorch", "hydra_plugins")):
                raise
            raise ImportError(
                f"`hydra/sweeper` is search, which needs the package {error.name!r}: it is not installed. Install it "
                "by `pip install 'hypertorch[search]'`, in this project by `.venv/bin/python -m pip install -c "
                "scripts/constraints.txt -e '.[search]'`."
            ) from error
        settings = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in self._settings.items()
        }
        module.Search(settings, self.config, self._context, self._task, self._launcher).run(arguments)
