"""Seeds of the runs of an experiment: no run that learns has the seed of one that validates or judges."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from hypertorch.autodiff.noise import mix

Purpose: TypeAlias = Literal["training", "validation", "evaluation", "search"]
"""What a run is for."""

_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def run_seed(seed: int, purpose: Purpose, index: int) -> int:
    """Returns the seed of one inner run: of its first weights and of its minibatches.

    Args:
        seed: of the experiment.
        purpose: what the run is for.
        index: which of the runs for this purpose it is, such as the outer step.
    """
    return mix(seed, _PURPOSES.index(purpose), index)
