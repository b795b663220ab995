"""How a problem is run: which tasks together, and in what precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from hypertorch.checks.values import is_count
from hypertorch.inner.ranks import Ranks

TaskRoute: TypeAlias = Literal["auto", "vmap", "loop"]
"""How the tasks of a batch are run: vectorised, one after the other, or whichever was measured to be faster."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a problem is run. The problem says what is solved, the backend how it is differentiated.

    The results agree up to rounding, but for noise that the model draws itself (dropout), which differs between "vmap"
    and "loop", and for `inner_dtype`, which computes with fewer bits.

    Args:
        tasks: how the tasks of a batch are run: "vmap", "loop", or "auto" for the loop unless "vmap", which holds the
            memory of all tasks, is faster by a fifth when both are measured. Name one where runs must be equal to the
            last bit. A problem without tasks is run as it is.
        chunk: most tasks run at once (memory is proportional to it); None for all. "loop" runs one.
        inner_dtype: `torch.bfloat16` computes the matrix products and convolutions of the inner loss in it
            (`torch.autocast`), which halves most of what a graph holds and is faster where the hardware has it. Params,
            buffers of the optimiser, cotangents and the hypergradient stay in float32, and are summed up in it; the
            outer loss too. None computes all in the dtype of the params.
        ranks: the processes that share the work, as `ht.join_ranks` gives them; None for this one alone. They share
            the tasks of a hypergradient, or for one inner problem the directions, perturbations or entries of
            `Forward`, `ForwardGradient` and `EvolutionStrategies`; and the problems of an evaluation.

    Raises:
        ValueError: if a setting is out of its range or an unknown word.
        TypeError: if `ranks` is of the wrong kind.
    """

    tasks: TaskRoute = "auto"
    chunk: int | None = None
    inner_dtype: torch.dtype | None = None
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        if self.tasks not in ("auto", "vmap", "loop"):
            raise ValueError(
                f"`tasks` is {self.tasks!r}, which names no way to run tasks. Use 'auto', 'vmap' or 'loop'."
            )
        if self.chunk is not None and not is_count(self.chunk):
            raise ValueError(
                f"`chunk` is {self.chunk!r}: a chunk holds at least one task. Pass None for all tasks at once."
            )
        if self.inner_dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"`inner_dtype` is {self.inner_dtype!r}: gradients of float16 vanish without a scale of the loss, and "
                "anything wider is the dtype of the params. Use `torch.bfloat16`, or None."
            )
        if self.ranks is not None and not isinstance(self.ranks, Ranks):
            raise TypeError(
                f"`ranks` is {self.ranks!r}, not a `Ranks`: it says which share of the work this process takes. Pass "
                "what `ht.join_ranks()` gives, or None for one process."
            )


DEFAULT = Execution()
"""The execution that is used where none is given."""
