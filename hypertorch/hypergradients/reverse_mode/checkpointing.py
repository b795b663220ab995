"""What reverse mode keeps of a run: all graphs, states at a distance, a number of states, or what a budget allows."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypertorch.autodiff.live_memory import parse_bytes
from hypertorch.checks.values import is_count
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.reverse_mode.memory_plan import plan_loop
from hypertorch.hypergradients.reverse_mode.segments import kept_every, revolving, single_steps
from hypertorch.hypergradients.reverse_mode.steps import Steps
from hypertorch.hypergradients.reverse_mode.sweep import Segment
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """The settings of `Reverse` that say what is kept, of which three exclude each other, and where.

    Without one, the whole graph is kept.

    Args:
        checkpoint_every: steps between kept states; "sqrt" for the number with the least memory.
        snapshots: most states kept at once.
        memory_budget: bytes, or a string such as "512MiB"; what is kept follows from a plan for each loop.
        spill_to: a folder for a file of kept states; None to keep them in memory.

    Raises:
        ValueError: if a setting is out of its range, more than one of the first three is given, or `spill_to` is no
            folder or given without one of them.
    """

    checkpoint_every: int | Literal["sqrt"] | None = None
    snapshots: int | None = None
    memory_budget: int | str | None = None
    spill_to: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None and name != "spill_to"]
        if len(given) > 1:
            raise ValueError(
                f"`{given[0]}` and `{given[1]}` are both given: each says what is kept, and they would contradict each "
                "other. Pass one of `checkpoint_every`, `snapshots` and `memory_budget`, or none for the whole graph."
            )
        if self.checkpoint_every not in (None, "sqrt"):
            _check_count(
                "checkpoint_every", self.checkpoint_every, "it is the number of steps between kept states", ", 'sqrt',"
            )
        if self.snapshots is not None:
            _check_count("snapshots", self.snapshots, "it is the most states that are kept, the first one included", "")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, "memory_budget")
        if self.spill_to is not None:
            _check_folder(self.spill_to, needed=not given)

    @property
    def whole_graph(self) -> bool:
        """Whether none is given."""
        return self == Checkpointing()

    def planned(self, loop: InnerLoop, variables: TensorDict) -> Checkpointing:
        """Returns what a memory budget makes of a loop; without one, itself.

        Cost: with a budget, one step and one vjp.

        Args:
            loop: the inner loop.
            variables: hyperparameters and context, as leaves.

        Raises:
            IncompatibleBackendError: if nothing fits the budget.
        """
        if self.memory_budget is None or loop.num_steps == 0:
            return self
        budget = parse_bytes(self.memory_budget, "memory_budget")
        plan = plan_loop(loop, variables, budget, spill=self.spill_to is not None)
        _logger.debug("%s", plan)
        # A plan for the whole graph sets none of them, which is how the whole graph is asked for.
        return Checkpointing(
            checkpoint_every=plan.checkpoint_every,
            snapshots=plan.snapshots,
            spill_to=self.spill_to if plan.spilled_states else None,
        )

    def segments(
        self, loop: InnerLoop, variables: TensorDict, steps: Steps, *, with_graphs: bool
    ) -> Generator[Segment]:
        """Returns the segments of a run; single steps of which every state is kept, unless a setting says less.

        Close it when done with, which removes a file of kept states.

        Args:
            loop: the inner loop, of at least one step.
            variables: hyperparameters and context, as leaves.
            steps: its steps.
            with_graphs: whether a segment is held with the graph of its steps; else as states alone.

        Raises:
            IncompatibleBackendError: if there are more steps between kept states than the horizon has.
        """
        folder = None if self.spill_to is None else Path(self.spill_to)
        if self.snapshots is not None:
            return revolving(loop, variables, steps, self.snapshots, folder)
        by = kept_every if with_graphs else single_steps
        return by(loop, variables, steps, self.interval(loop.num_steps, with_graphs=with_graphs) or 1, folder)

    def interval(self, num_steps: int, *, with_graphs: bool = False) -> int | None:
        """Returns the steps between kept states; None to keep all."""
        if self.checkpoint_every in (None, 1):
            return None
        if self.checkpoint_every == "sqrt":
            # A graph holds the state after a step and its gradient at least.
            states_per_step = 2 if with_graphs else 1
            # `num_steps / k` kept states beside `c k` in a segment are fewest at `k = sqrt(num_steps / c)`.
            return max(1, round(math.sqrt(num_steps / states_per_step)))
        if self.checkpoint_every > num_steps:
            raise IncompatibleBackendError(
                f"`Reverse(checkpoint_every={self.checkpoint_every})` got a problem with `num_steps` = {num_steps}: no "
                "state would be kept between segments. Use at most that many steps, or `Reverse()` for the whole graph."
            )
        return self.checkpoint_every


def _check_count(name: str, value: object, meaning: str, word: str) -> None:
    if not is_count(value):
        raise ValueError(
            f"`{name}` is {value!r}: {meaning}, at least 1. Pass a whole number{word} or None to keep the whole graph."
        )


def _check_folder(folder: str | os.PathLike[str], *, needed: bool) -> None:
    if not _is_folder(folder):
        raise ValueError(
            f"`spill_to` is {folder!r}, which is no folder: the file of kept states has nowhere to lie. Pass one that "
            "there is, on a disk with room, or None to keep states in memory."
        )
    if needed:
        raise ValueError(
            f"`spill_to` is {str(folder)!r} and nothing says which states are kept: the whole graph is, and a graph "
            "cannot lie in a file. Pass `checkpoint_every`, `snapshots` or `memory_budget` too, such as "
            "`checkpoint_every=100`; with 1, every state is kept."
        )


def _is_folder(value: object) -> bool:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    # An empty text would be the current folder, which nobody who leaves it out means.
    if not isinstance(path, str) or not path:
        return False
    try:
        return Path(path).is_dir()
    except OSError:  # a name that is too long, or a folder that may not be looked into
        return False
