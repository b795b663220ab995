"""Which classes the configuration of a run's folder may name: a folder that a stranger made must not run code.

The user's own configs and command line name whatever they like: that is the user's own code. What is read from a run's
folder may be anybody's, and Hydra builds what it names. (Hydra 1.3 itself keeps a list of what must not be built, and
says that such a list is no boundary; what may be built is listed here.)
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import experiments
import hypertorch
import hypertorch.fewshot
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.runs.experiment import Experiment

_TARGET = "_target_"
_EXPERIMENTS = [str(Path(experiments.__file__).resolve().parent)]


def check_plain(values: object, *, place: str) -> None:
    """Checks that a configuration holds what it says, and refers to nothing outside of it.

    Args:
        values: the configuration as dicts, lists and plain values, not resolved.
        place: where it is from, for the message.

    Raises:
        ExpectedFailure: if there is a `${...}` in it: what resolves one may read the environment.
    """
    for key, value in _leaves(values, ""):
        if isinstance(value, str) and "${" in value:
            raise ExpectedFailure(
                f"`{key}` in {place!r} is {value!r}, which refers to something outside: no run writes that, so the "
                "file was altered. Restore it, or use another run."
            )


def check_trusted(values: object, *, place: str, trusted: Sequence[str]) -> None:
    """Checks what building a configuration would run: hypertorch, this project's experiments, PyTorch's optimizers.

    Args:
        values: the configuration as dicts, lists and plain values, which `check_plain` has looked at.
        place: where it is from, for the message.
        trusted: names of packages whose classes and functions may be run too.

    Raises:
        ExpectedFailure: if it names another class or function.
    """
    for key, value in _leaves(values, ""):
        if key.rpartition(".")[2] == _TARGET and not _may_be_built(value, trusted):
            raise ExpectedFailure(
                f"`{key}` in {place!r} is {value!r}, and building it would run code that a run's folder may not name: "
                "only public classes, schedules and data sets of hypertorch, experiments of this project, and the "
                "optimizers and schedulers of torch.optim. If the run is yours and the class is of a package of your "
                "own, name the package: trust=[my_package]."
            )


def _leaves(value: object, key: str) -> Iterator[tuple[str, object]]:
    """Yields every value that holds no others, by its dotted name; so is a `_target_`, whatever it holds."""
    entries: Iterable[tuple[object, object]]
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, (list, tuple)):
        entries = enumerate(value)
    else:
        yield key, value
        return
    if key.rpartition(".")[2] == _TARGET:
        yield key, value
    for name, item in entries:
        yield from _leaves(item, f"{key}.{name}" if key else str(name))


def _may_be_built(target: object, trusted: Sequence[str]) -> bool:
    if not isinstance(target, str):
        return False
    if _is_own_experiment(target):
        return True
    package = next((name for name in trusted if target.startswith(f"{name}.")), None)
    # Nothing is imported on the word of a folder: importing runs code, and what is public is imported already.
    found = _loaded(target) if package is None else _imported(target)
    if any(found is public for public in _public()):
        return True
    # A name may lead out of the package, to what one of its modules imports.
    is_code = inspect.isclass(found) or inspect.isroutine(found)
    return package is not None and is_code and f"{getattr(found, '__module__', None)}.".startswith(f"{package}.")


def _is_own_experiment(target: str) -> bool:
    """Returns whether a name is that of an experiment's class, in a module of this project's folder of experiments."""
    package, _, name = target.rpartition(".")
    if not any(package == f"{experiments.__name__}.{module.name}" for module in pkgutil.iter_modules(_EXPERIMENTS)):
        return False
    # The project's own module, which a configuration of its own names too: importing it runs nothing of the folder's.
    found = vars(importlib.import_module(package)).get(name)
    return inspect.isclass(found) and issubclass(found, Experiment) and not inspect.isabstract(found)


def _loaded(target: str) -> Any:
    """Returns what a dotted name means in the modules that are loaded; None if it means nothing."""
    first, *others = target.split(".")
    found: Any = sys.modules.get(first)
    for name in others:
        # Not `getattr`: a module may import something to answer it.
        found = vars(found).get(name) if isinstance(found, ModuleType) else None
    return found


def _imported(target: str) -> Any:
    """Returns what a dotted name of a trusted package means, by Hydra's own rule: attributes first, then modules."""
    first, *others = target.split(".")
    name = first
    try:
        found: Any = importlib.import_module(first)
        for part in others:
            name = f"{name}.{part}"
            if isinstance(found, ModuleType) and not hasattr(found, part):
                importlib.import_module(name)
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ExpectedFailure(
            f"`trust` is there for {target!r}, which the run was made with and which cannot be imported here: {error}. "
            "Install the package, or run where it is (PYTHONPATH)."
        ) from error
    return found


def _public() -> Iterator[Any]:
    """Yields what any run may be made of."""
    for module in (hypertorch, *(value for value in _exported(hypertorch) if isinstance(value, ModuleType))):
        # Not its functions, one of which writes files.
        yield from (value for value in _exported(module) if inspect.isclass(value))
    # Schedules are functions, which count; its data sets are too, which read them.
    yield from _exported(hypertorch.dynamics.schedules)
    yield from _exported(hypertorch.fewshot)
    for module, base in (
        (torch.optim, torch.optim.Optimizer),
        (torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
    ):
        yield from (value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, base))


def _exported(module: ModuleType) -> list[Any]:
    return [getattr(module, name) for name in getattr(module, "__all__", ())]
