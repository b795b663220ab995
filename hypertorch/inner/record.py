"""What a run did, counted where it is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Cost:
    """The cost of a run in counts, which do not depend on the machine.

    Attributes:
        steps: inner steps evaluated, those that were run again among them.
        vjps: inner steps differentiated in reverse mode, once for every cotangent.
        jvps: inner steps differentiated in forward mode, once for every tangent.
        stored_states: most inner states kept at once, in memory and in a file.
        graph_steps: most inner steps whose graph was kept at once.
    """

    steps: int = 0
    vjps: int = 0
    jvps: int = 0
    stored_states: int = 0
    graph_steps: int = 0

    def __add__(self, other: Cost) -> Cost:
        # Slices of tasks run one after the other: counts add up, and what is held at once does not.
        return Cost(
            steps=self.steps + other.steps,
            vjps=self.vjps + other.vjps,
            jvps=self.jvps + other.jvps,
            stored_states=max(self.stored_states, other.stored_states),
            graph_steps=max(self.graph_steps, other.graph_steps),
        )


class Record:
    """What the runs of one inner loop did.

    Attributes:
        cost: the counts.
        losses: the inner loss before each step, shape `()` or `(tasks,)`, by the step; of a step that is run again,
            the newest.
        tracked_buffers: names of the buffers that some step has computed with a derivative.
    """

    # A plain class: `torch.compile` traces no constructor of a dataclass that makes its own defaults.
    def __init__(self) -> None:
        self.cost = Cost(0, 0, 0, 0, 0)
        self.losses: dict[int, Tensor] = {}
        self.tracked_buffers: frozenset[str] = frozenset()

    def add_step(
        self, step: int | None, loss: Tensor | None = None, tracked_buffers: frozenset[str] = frozenset()
    ) -> None:
        """Counts a step, and keeps the inner loss before it.

        Args:
            step: position in the horizon; None for a step, or an evaluation of the inner loss, apart from the run.
            loss: the inner loss.
            tracked_buffers: names of the buffers that were computed with a derivative.
        """
        self.cost.steps += 1
        if step is not None and loss is not None:
            self.losses[step] = loss
        if tracked_buffers:
            self.track(tracked_buffers)

    def gather(self, steps: range) -> None:
        """Moves the losses of some steps into one tensor, of which each is a view.

        A loss is a few bytes. Kept by itself among the large tensors of its step, it keeps a large piece of the heap
        from being used again: some 13 KB for every step, where a step frees tensors of 100 KB.
        """
        found = [step for step in steps if step in self.losses]
        if found:
            self.losses.update(zip(found, torch.stack([self.losses[step] for step in found]).unbind(), strict=True))

    def track(self, buffers: Iterable[str]) -> None:
        """Notes the names of buffers that a step computed with a derivative."""
        self.tracked_buffers |= frozenset(buffers)

    def add_vjps(self, steps: int, *, graph_steps: int) -> None:
        """Counts steps that were differentiated in reverse mode, and how many of their graphs were held at once."""
        self.cost.vjps += steps
        self.cost.graph_steps = max(self.cost.graph_steps, graph_steps)

    def add_jvps(self, tangents: int) -> None:
        """Counts a step that was differentiated in forward mode, once for every tangent."""
        self.cost.jvps += tangents
        # A tangent is as large as the state that it belongs to.
        self.hold(1 + tangents)

    def hold(self, states: int) -> None:
        """Notes how many inner states are held at once."""
        self.cost.stored_states = max(self.cost.stored_states, states)

    def add(self, other: Record) -> None:
        """Adds what other runs did."""
        self.cost += other.cost
        self.losses |= other.losses
        self.track(other.tracked_buffers)
