"""What the pieces of a reverse-mode run hold, measured in live tensor bytes on one step of the inner loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.live_memory import PeakMemory, storage_bytes
from hypertorch.autodiff.products import vjp
from hypertorch.hypergradients.reverse_mode.graph import with_terms
from hypertorch.hypergradients.reverse_mode.sweep import outer_part, pull_back
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What the pieces of a run hold, in bytes of live tensors beside what lives before each piece.

    Attributes:
        initial: the initial state, as far as it does not share memory with hyperparameters.
        initial_graph: the same with its graph.
        initial_vjp: most while the initialisation's part of the hypergradient is computed.
        state: an inner state.
        spilled_state: an inner state that comes out of a file, where no tensor shares memory with another.
        loss: the value of the inner loss, which is kept for every step run.
        graph: the graph of one step, with the state after it.
        further_graph: what each further step adds to a graph.
        forward: most while one step runs with a graph.
        backward: most while cotangents are pulled back through one step's graph, beside that graph.
        last_term: most while the outer loss is differentiated.
        cotangents: the derivative in a state.
        grads: the derivative in the variables, but for the initialisation's part.
    """

    initial: int
    initial_graph: int
    initial_vjp: int
    state: int
    spilled_state: int
    loss: int
    graph: int
    further_graph: int
    forward: int
    backward: int
    last_term: int
    cotangents: int
    grads: int

    def graph_of(self, num_steps: int) -> int:
        """Returns the bytes of the graph of consecutive steps, the state that they start from not counted."""
        return self.graph + (num_steps - 1) * self.further_graph

    def whole(self, num_steps: int) -> int:
        """Returns the most bytes while a graph of all steps and the outer loss is made and differentiated."""
        graph = self.graph_of(num_steps)
        last_step = self.cotangents + self.backward
        gathering = graph + last_step + self._growth(num_steps, self.grads)
        # While the last step is added to the graph, while the outer loss is differentiated, while cotangents go back.
        return max(graph - self.graph + self.forward, graph + self.last_term, gathering, self._sum(num_steps))

    def segment(self, num_steps: int) -> int:
        """Returns the most bytes while consecutive steps are run with a graph and cotangents pulled back through it."""
        graph = self.graph_of(num_steps)
        last_step = self.cotangents + self.backward
        # The cotangents of the segment's end are held beside those on their way.
        growth = self._growth(num_steps, self.grads + self.cotangents)
        return max(
            graph - self.graph + self.forward, graph + last_step + growth, self.cotangents + self._sum(num_steps)
        )

    def _sum(self, num_steps: int) -> int:
        """Returns the bytes while autograd adds what a step gives to what those behind it gave: into a third tensor."""
        return self.graph_of(num_steps - 1) + self.cotangents + 3 * self.grads if num_steps > 1 else 0

    def _growth(self, num_steps: int, gathered: int) -> int:
        """Returns by how much more what is gathered grows than the graph shrinks, from one step to the one before."""
        return max(0, gathered - self.further_graph) if num_steps > 1 else 0


def measure_step(loop: InnerLoop, variables: TensorDict) -> StepMemory:
    """Returns what the pieces of a run hold, by running and differentiating one step and the outer loss.

    The step is the second of the horizon where there is one (an optimiser's first step may be special), taken from
    the initial state: bytes depend on shapes, not on values. They are counted, so that the same problem gives the
    same answer.

    Cost: one step and one vjp of it, and twice the initial state and once the outer loss with their vjps, slowed down
    by the counting. Memory: as step by step, with one state more.

    Args:
        loop: an inner loop of at least one step.
        variables: hyperparameters and context, as leaves.
    """
    with PeakMemory() as memory:
        with torch.no_grad():
            first = loop.initial(tree.detach(variables))
        initial = memory.current
        leaves = loop.leaves(first)

        step = min(1, loop.num_steps - 1)
        with torch.enable_grad():
            # Copies at both ends of the step: a chain of steps holds, of the state between two of them, what remains
            # of either end when the copies are gone.
            departure = leaves.replace_tensors([value.clone() for value in leaves.tensors()])
            before = _restart(memory)
            arrival, loss = loop.transition(departure, variables, step)
            term = loop.term(arrival, variables, step)
            losses = [] if loss.value is None else [loss.value]
            # It holds the buffers of both ends of the step, which would be counted with the graph.
            del loss
            forward, graph = memory.peak - before, memory.current - before
            last = arrival.replace_tensors([value.clone() for value in arrival.tensors()])
        # A rule may hand on a tensor as it is, which costs a run nothing.
        state = storage_bytes(arrival.tensors(), besides=departure.tensors())
        spilled_state = sum(value.numel() * value.element_size() for value in arrival.tensors())
        sizes = [storage_bytes([value], besides=departure.tensors()) for value in arrival.tensors()]
        at_start, at_end = _watched(departure), _watched(arrival)
        del departure, arrival
        # Held on to, as by a run, whose states do not go with a graph.
        remains = [(start(), end()) for start, end in zip(at_start, at_end, strict=True)]
        between = sum(size for size, remain in zip(sizes, remains, strict=True) if remain != (None, None))

        before = _restart(memory)
        # From the copy: the outer loss must add nothing to the step's own graph.
        direct, cotangents, _ = outer_part(loop, variables, last)
        last_peak = memory.peak - before

        before = _restart(memory)
        part, earlier = pull_back(*with_terms(last, cotangents, term), leaves, variables)
        backward = memory.peak - before
        grads = tree.accumulate(direct, part)

        before = _restart(memory)
        with torch.enable_grad():
            start = loop.initial(variables)
        initial_graph = memory.current - before
        vjp(start.tensors(), earlier, variables)
        initial_vjp = memory.peak - before

    # The step is counted; its loss is that of no state of the run, and is not kept.
    loop.record.add_step(None)
    loop.record.add_vjps(1, graph_steps=0)
    return StepMemory(
        initial=initial,
        initial_graph=initial_graph,
        initial_vjp=initial_vjp,
        state=state,
        spilled_state=spilled_state,
        loss=storage_bytes(losses),
        graph=graph,
        further_graph=graph - state + between,
        forward=forward,
        backward=backward,
        last_term=last_peak,
        cotangents=_bytes(earlier),
        grads=_bytes(grads.values()),
    )


def _watched(state: InnerState) -> list[weakref.ref[torch.UntypedStorage]]:
    return [weakref.ref(value.untyped_storage()) for value in state.tensors()]


def _restart(memory: PeakMemory) -> int:
    memory.reset_peak()
    return memory.current


def _bytes(derivative: Iterable[Tensor | None]) -> int:
    return storage_bytes(value for value in derivative if value is not None)
