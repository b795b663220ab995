"""Hyperparameter search: with hypergradients, of learning rates, of widths, and what the command line's is made of.

What needs BoTorch or Optuna is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hypertorch.search.dataset_distance import DatasetDistance, loss_distances
from hypertorch.search.deep_set import DeepSet, pad_sets
from hypertorch.search.kernels import RBF, Kernel, Matern52
from hypertorch.search.nearest_best import nearest_best
from hypertorch.search.portfolio import greedy_portfolio
from hypertorch.search.range_test import NoSuggestionError, RangeFigures, lr_range_test, with_lr
from hypertorch.search.regret import regrets
from hypertorch.search.widening import widen

if TYPE_CHECKING:
    from hypertorch.search.bilevel_search import Evaluation, SearchResult, minimise
    from hypertorch.search.command import FailedTrial, SearchedCommand, searchable
    from hypertorch.search.evidence import fit_gradient_gp
    from hypertorch.search.gradient_bayes import Best, GradientBayes
    from hypertorch.search.gradient_gp import GPParameters, GradientGP
    from hypertorch.search.gradient_sampler import GradientSampler
    from hypertorch.search.halving import Bracket, hyperband, successive_halving
    from hypertorch.search.observations import Observations
    from hypertorch.search.pruning_logger import PruningLogger
    from hypertorch.search.racing import is_worse

__all__ = [
    "RBF",
    "Best",
    "Bracket",
    "DatasetDistance",
    "DeepSet",
    "Evaluation",
    "FailedTrial",
    "GPParameters",
    "GradientBayes",
    "GradientGP",
    "GradientSampler",
    "Kernel",
    "Matern52",
    "NoSuggestionError",
    "Observations",
    "PruningLogger",
    "RangeFigures",
    "SearchResult",
    "SearchedCommand",
    "fit_gradient_gp",
    "greedy_portfolio",
    "hyperband",
    "is_worse",
    "loss_distances",
    "lr_range_test",
    "minimise",
    "nearest_best",
    "pad_sets",
    "regrets",
    "searchable",
    "successive_halving",
    "widen",
    "with_lr",
]

# The module of each name that needs an optional package, and the extra that installs it.
_LAZY = {
    "Best": ("gradient_bayes", "gp"),
    "Bracket": ("halving", "search"),
    "Evaluation": ("bilevel_search", "gp"),
    "FailedTrial": ("command", "search"),
    "GPParameters": ("gradient_gp", "gp"),
    "GradientBayes": ("gradient_bayes", "gp"),
    "GradientGP": ("gradient_gp", "gp"),
    "GradientSampler": ("gradient_sampler", "gp,search"),
    "Observations": ("observations", "gp"),
    "PruningLogger": ("pruning_logger", "search"),
    "SearchResult": ("bilevel_search", "gp"),
    "SearchedCommand": ("command", "search"),
    "fit_gradient_gp": ("evidence", "gp"),
    "hyperband": ("halving", "search"),
    "is_worse": ("racing", "search"),
    "minimise": ("bilevel_search", "gp"),
    "searchable": ("command", "search"),
    "successive_halving": ("halving", "search"),
}


def __getattr__(name: str) -> Any:
    """Returns a name whose module needs an optional package (PEP 562).

    Raises:
        ImportError: if the package is not installed.
    """
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _LAZY[name]
    try:
        found = import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("hypertorch"):
            raise
        raise ImportError(
            f"`ht.search.{name}` needs {error.name}, which is not installed: hypertorch does not bring it along. "
            f"Install it by `pip install 'hypertorch[{extra}]'`."
        ) from error
    return getattr(found, name)


def __dir__() -> list[str]:
    return sorted(__all__)
