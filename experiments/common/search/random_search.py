"""Random search of a few numbers: what a hypergradient is compared with at the same CPU time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.common.results.line_styles import COLOURS

Draw: TypeAlias = dict[str, float]
"""A value for every name."""


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """What a random search has drawn, and what each draw gave.

    Args:
        draws: values by name, in the order of drawing.
        losses: of each draw; infinite where it diverged.
        seconds: what the search took (unit: CPU seconds).
    """

    draws: list[Draw]
    losses: list[float]
    seconds: float

    @property
    def best(self) -> Draw:
        """The draw with the least loss."""
        return self.draws[int(np.argmin(self.losses))]

    def expected_best(self) -> list[float]:
        """Returns the expected least loss of k of the draws, chosen at random with replacement, for k = 1, 2, ...

        With the losses in order `l_1 <= ... <= l_n` it is `sum_i l_i ((n-i+1)^k - (n-i)^k) / n^k`. A draw that
        diverged counts as the worst of the others.

        References:
            Dodge et al. (2019), Show your work: improved reporting of experimental results, equation 1.
        """
        losses = np.sort(self.losses)
        losses = np.minimum(losses, losses[np.isfinite(losses)].max(initial=-np.inf))
        # The share of draws that are at least as bad as the i-th best.
        shares = np.arange(len(losses), -1, -1) / len(losses)
        return [float(losses @ -np.diff(shares**k)) for k in range(1, len(losses) + 1)]

    def plot(self, path: Path, *, label: str, reached: float, reached_by: str) -> None:
        """Draws the loss of each draw, the expected best of k draws, and what was reached otherwise.

        Args:
            path: the picture.
            label: what the loss is.
            reached: the loss to compare with.
            reached_by: what reached it.
        """
        figure = Figure(figsize=(6.5, 4), layout="constrained")
        axes = figure.subplots()
        count = range(1, len(self.losses) + 1)
        axes.plot(count, self.losses, ".", color=COLOURS[5], label="draws, in their order")
        axes.plot(count, self.expected_best(), color=COLOURS[0], linewidth=2, label="expected best of k draws")
        axes.axhline(reached, color=COLOURS[1], linestyle="--", label=reached_by)
        axes.set(xlabel=f"draws k (all: {self.seconds:.0f} CPU seconds)", ylabel=label, yscale="log")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=100)


def random_search(
    ranges: Mapping[str, tuple[float, float]], loss: Callable[[Draw], float], *, cpu_seconds: float, seed: int = 0
) -> RandomSearch:
    """Draws uniformly until the CPU time is up, at least once; the draw under way is finished.

    Args:
        ranges: least and greatest value by name.
        loss: of a draw, less is better; NaN where it diverged.
        cpu_seconds: of this process (unit: seconds).
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    draws: list[Draw] = []
    losses: list[float] = []
    start = process_time()
    while not draws or process_time() - start < cpu_seconds:
        places = torch.rand(len(ranges), generator=generator, dtype=torch.float64).tolist()
        limits = zip(ranges.items(), places, strict=True)
        draws.append({name: low + (high - low) * place for (name, (low, high)), place in limits})
        losses.append(float(np.nan_to_num(loss(draws[-1]), nan=np.inf, posinf=np.inf)))
    return RandomSearch(draws=draws, losses=losses, seconds=process_time() - start)
