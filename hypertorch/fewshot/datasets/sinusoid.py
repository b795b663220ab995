"""Regression of sine waves, the smallest problem on which learning to learn shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_seed
from hypertorch.fewshot._checks import check_num_queries, check_num_tasks, check_shot, check_step
from hypertorch.fewshot._random import random_uniform
from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples

# The ranges of section 5.1 of the paper.
_AMPLITUDES = (0.1, 5.0)
_PHASES = (0.0, float(np.pi))
_INPUTS = (-5.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class Sinusoid(EpisodeSource):
    """Episodes of sine regression: `y = amplitude * sin(x - phase)` without noise.

    Each task has its own amplitude, uniform in [0.1, 5], and phase, uniform in [0, pi]; inputs are uniform in [-5, 5].
    A batch is a pure function of `(seed, step)`; the random numbers are equal on every platform, the sine to the last
    digit or two.

    Args:
        shot: support points per task, at least 1.
        num_queries: query points per task, at least 1.
        num_tasks: episodes in a batch, at least 1.
        seed: selects the stream of episodes.
        dtype: floating-point type of inputs and targets.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is too small.

    References:
        Finn et al. (2017), Model-agnostic meta-learning for fast adaptation of deep networks, section 5.1.
    """

    shot: int = 10
    num_queries: int = 10
    num_tasks: int = 4
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_fields(self, "dtype")
        check_shot(self.shot)
        check_num_queries(self.num_queries)
        check_num_tasks(self.num_tasks)
        check_seed(self.seed)
        if not self.dtype.is_floating_point:
            raise TypeError(f"`dtype` is {self.dtype}: a sine has real values. Use `torch.float32` or `torch.float64`.")

    def at(self, step: int) -> Episode:
        """Returns the batch of episodes number `step`.

        Args:
            step: which batch, at least 0.

        Returns:
            An `Episode` with support inputs and targets of shape `(tasks, shot, 1)` and query ones of shape
            `(tasks, num_queries, 1)`.

        Raises:
            TypeError: if `step` is no integer.
            ValueError: if `step` is negative.
        """
        check_step(step)
        # A row per task: amplitude, phase, inputs of the support, inputs of the queries. Rows follow each other in the
        # stream, so another `shot` gives other tasks, too.
        uniform = random_uniform((self.num_tasks, 2 + self.shot + self.num_queries), self.seed, step)
        amplitude, phase = _between(uniform[:, :1], _AMPLITUDES), _between(uniform[:, 1:2], _PHASES)
        inputs = _between(uniform[:, 2:], _INPUTS)
        # In double precision whatever `dtype` is: episodes in single precision are these, rounded.
        targets = amplitude * np.sin(inputs - phase)
        return Episode(
            Examples(self._tensor(inputs[:, : self.shot]), self._tensor(targets[:, : self.shot])),
            Examples(self._tensor(inputs[:, self.shot :]), self._tensor(targets[:, self.shot :])),
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).unsqueeze(-1).to(self.dtype)


def _between(uniform: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    low, high = bounds
    return low + (high - low) * uniform
