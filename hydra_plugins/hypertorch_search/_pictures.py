"""Pictures of a study, by Optuna."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as drawn

_KINDS: dict[str, Callable[..., Any]] = {
    "history": drawn.plot_optimization_history,
    "importance": drawn.plot_param_importances,
    "slices": drawn.plot_slice,
    "parallel_coordinates": drawn.plot_parallel_coordinate,
}


def draw_study(study: optuna.Study, objectives: Sequence[str], folder: Path) -> list[Path]:
    """Writes history, importance, slices and parallel coordinates of each objective, and the front of two.

    Args:
        study: what was found.
        objectives: their names.
        folder: where to.

    Returns:
        The pictures; none with fewer than two values, and no importance where all are equal, which no setting explains.
    """
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(finished) < 2:
        return []
    written = []
    with _apart():
        for index, objective in enumerate(objectives):
            is_constant = len({trial.values[index] for trial in finished}) == 1
            for kind, plot in _KINDS.items():
                if kind == "importance" and is_constant:
                    continue
                which = {} if len(objectives) == 1 else {"target": _objective(index)}
                if kind == "importance" and which and study.directions[index].name == "MAXIMIZE":
                    which = {"target": _negated(index)}  # it is that for low values
                name = kind if len(objectives) == 1 else f"{objective}_{kind}"
                written.append(_save(plot(study, **which, target_name=objective), folder / f"{name}.png"))
        if len(objectives) == 2:
            written.append(_save(drawn.plot_pareto_front(study, target_names=list(objectives)), folder / "front.png"))
    return written


def _objective(index: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: trial.values[index]


def _negated(index: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: -trial.values[index]


@contextmanager
def _apart() -> Iterator[None]:
    """Without a window, and with the style of the process restored: Optuna's pictures set one for all.

    Also without warnings and messages of Matplotlib and Optuna: they are on choices and on settings of one value, which
    searches have, and would stand amid the summary.
    """
    backend, level = mpl.get_backend(), optuna.logging.get_verbosity()
    matplotlib_log = logging.getLogger("matplotlib")
    matplotlib_level = matplotlib_log.level
    plt.switch_backend("Agg")
    matplotlib_log.setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with mpl.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
        matplotlib_log.setLevel(matplotlib_level)
        plt.switch_backend(backend)


def _save(axes: Any, path: Path) -> Path:
    figure = np.ravel(axes)[0].figure
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    return path
