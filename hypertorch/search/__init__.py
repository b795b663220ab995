"""Hyperparameter search: what the sweeper of the command line is made of, and what serves searches in Python.

Each module is imported when one of its names is first asked for: most need packages of the extra `search`.
"""

import importlib
from typing import Any

_MODULES = {
    "Bracket": "hypertorch.search.halving",
    "FailedTrial": "hypertorch.search.command",
    "PruningLogger": "hypertorch.search.pruning_logger",
    "SearchedCommand": "hypertorch.search.command",
    "hyperband": "hypertorch.search.halving",
    "is_worse": "hypertorch.search.racing",
    "searchable": "hypertorch.search.command",
    "successive_halving": "hypertorch.search.halving",
}

__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if str(error.name).startswith("hypertorch"):
            raise
        raise ImportError(
            f"`hypertorch.search.{name}` needs the package {error.name!r}, which is not installed: hypertorch alone "
            "does not bring it. Install it by `pip install 'hypertorch[search]'`."
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
