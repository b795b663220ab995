"""The cost of a run in counts, which no clock can blur."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Cost:
    """What a run took, counted as it went.

    Attributes:
        steps: inner steps evaluated, replays included.
        vjps: inner steps differentiated in reverse mode, once for every cotangent.
        jvps: inner steps differentiated in forward mode, once for every tangent.
        stored_states: most inner states kept at once.
        graph_steps: most inner steps whose graph was kept at once.
    """

    steps: int = 0
    vjps: int = 0
    jvps: int = 0
    stored_states: int = 0
    graph_steps: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            steps=self.steps + other.steps,
            vjps=self.vjps + other.vjps,
            jvps=self.jvps + other.jvps,
            stored_states=max(self.stored_states, other.stored_states),
            graph_steps=max(self.graph_steps, other.graph_steps),
        )
