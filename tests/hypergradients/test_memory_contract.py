"""How memory grows with the horizon, backend by backend, counted in live tensor bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

import hypertorch as ht
from hypertorch.hypergradients.revolve import states_alive
from hypertorch.live_memory import PeakMemory, storage_bytes
from hypertorch.types import Batch
from tests.helpers.problems import LambdaInner, LambdaOuter
from tests.helpers.sized_problems import mlp, sized_problem

backends = ht.hypergradients
Reverse = backends.Reverse
SGD = ht.dynamics.SGD(lr=0.1)
STATE = 4 * (20 * 16 + 16 + 16 * 5 + 5)  # bytes of the weights of `problem_of`
SCALAR = 4


class Flat(NamedTuple):
    """A backend whose memory does not grow with the horizon, but for figures of a few bytes at every step."""

    backend: ht.Hypergradient
    dynamics: ht.Dynamics = SGD
    learnt_init: bool = False
    bytes_per_step: float = 2 * SCALAR  # the inner loss, of the step and of its replay


REVERSIBLE = ht.dynamics.ReversibleMomentum(lr=0.1, momentum=0.9)
FLAT = {
    "truncated": Flat(backends.Truncated(window=4)),
    "forward": Flat(backends.Forward(chunk_size=8), bytes_per_step=5 * SCALAR),  # 32 directions
    "forward gradient": Flat(backends.ForwardGradient(num_directions=2)),
    "implicit": Flat(backends.Implicit()),
    "one step": Flat(backends.OneStep()),
    "evolution strategies": Flat(backends.EvolutionStrategies(num_pairs=2, sigma=0.1), bytes_per_step=6 * SCALAR),
    "EvoGrad": Flat(backends.EvoGrad()),
    # 0.15 bits for each weight and step, and the losses of the run there and back.
    "reversible": Flat(backends.Reversible(), REVERSIBLE, bytes_per_step=2 * SCALAR + STATE / 4 * 0.16 / 8),
}
GROWING = {
    "whole graph": Reverse(),
    "step-wise": Reverse(checkpoint_every=1),
    "sqrt": Reverse(checkpoint_every="sqrt"),
    "revolve": Reverse(snapshots=3),
    "budget": Reverse(memory_budget="150KiB"),
    "first order": backends.FirstOrder(),
}


@pytest.fixture(autouse=True)
def _without_garbage_collection() -> Iterator[None]:
    """What is freed must be freed by counting references: cycles live until nobody knows when."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def problem_of(num_steps: int, case: Flat = Flat(Reverse())) -> ht.BilevelProblem:
    """A net of 20-16-5 on 32 examples: the graph of a step is some eight times a state."""
    problem = sized_problem(
        mlp(20, 16, 5), 32, 20, num_steps=num_steps, dynamics=case.dynamics, learnt_init=case.learnt_init
    )
    return problem


def run(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> tuple[PeakMemory, ht.HypergradientResult]:
    hparams = problem.init_hparams()
    ht.hypergradient(problem, hparams, backend=backend)  # what is probed once for a problem is not the backend's
    with PeakMemory() as memory:
        result = ht.hypergradient(problem, hparams, backend=backend)
    return memory, result


def peak(num_steps: int, case: Flat | ht.Hypergradient) -> int:
    case = case if isinstance(case, Flat) else Flat(case)
    return run(problem_of(num_steps, case), case.backend)[0].peak
