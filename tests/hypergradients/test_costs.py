"""What each backend counts, for horizons of one, two and five steps: the figures of its documented cost."""

from __future__ import annotations

import pytest

import hypertorch as ht
from hypertorch.hypergradients import Forward, ForwardGradient, Implicit, OneStep, Reverse, Reversible, Truncated
from hypertorch.linear_solvers import Neumann
from tests.helpers.problems import Ridge

# Steps, vjps, jvps, stored states and steps whose graph is kept; two hyperparameters of one entry each.
HORIZONS = (1, 2, 5)
COSTS: dict[str, tuple[ht.Hypergradient, tuple[tuple[int, ...], ...]]] = {
    "whole graph": (Reverse(), ((1, 1, 0, 0, 1), (2, 2, 0, 0, 2), (5, 5, 0, 0, 5))),
    "step by step": (Reverse(checkpoint_every=1), ((1, 1, 0, 2, 1), (3, 2, 0, 3, 1), (9, 5, 0, 6, 1))),
    "segments": (Reverse(checkpoint_every="sqrt"), ((1, 1, 0, 2, 1), (3, 2, 0, 3, 1), (8, 5, 0, 4, 2))),
    "snapshots": (Reverse(snapshots=2), ((1, 1, 0, 2, 1), (3, 2, 0, 3, 1), (11, 5, 0, 3, 1))),
    "mixed": (Reverse(derivative="mixed"), ((2, 1, 0, 2, 1), (4, 2, 0, 3, 1), (10, 5, 0, 6, 1))),
    "forward": (Forward(), ((1, 0, 2, 3, 0), (2, 0, 4, 3, 0), (5, 0, 10, 3, 0))),
    "forward, one by one": (Forward(chunk_size=1), ((2, 0, 2, 2, 0), (4, 0, 4, 2, 0), (10, 0, 10, 2, 0))),
    "forward gradient": (ForwardGradient(num_samples=3), ((1, 0, 3, 4, 0), (2, 0, 6, 4, 0), (5, 0, 15, 4, 0))),
    "forward gradient, in chunks": (
        ForwardGradient(num_samples=3, chunk_size=2),
        ((2, 0, 3, 3, 0), (4, 0, 6, 3, 0), (10, 0, 15, 3, 0)),
    ),
    "truncated": (Truncated(window=2), ((1, 1, 0, 0, 1), (2, 2, 0, 0, 2), (5, 2, 0, 0, 2))),
    "one step": (OneStep(), ((1, 1, 0, 0, 1), (2, 1, 0, 0, 1), (5, 1, 0, 0, 1))),
    "one step, a difference": (OneStep(finite_difference=True), ((3, 1, 0, 0, 1), (4, 1, 0, 0, 1), (7, 1, 0, 0, 1))),
    "reversible": (Reversible(), ((2, 1, 0, 2, 1), (4, 2, 0, 2, 1), (10, 5, 0, 2, 1))),
    "implicit": (
        Implicit(solver=Neumann(num_terms=4), map="step", residual_tolerance=None, stationarity_tolerance=None),
        ((3, 5, 0, 1, 1), (4, 5, 0, 1, 1), (7, 5, 0, 1, 1)),
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_is_what_is_documented(name: str) -> None:
    backend, expected = COSTS[name]
    found = []
    for num_steps in HORIZONS:
        rule = ht.dynamics.ReversibleMomentum if isinstance(backend, Reversible) else ht.dynamics.SGD
        problem = Ridge().problem(num_steps, rule(lr=ht.Hyper("eta")))
        stats = ht.hypergradient(problem, problem.init_hparams(), backend=backend).stats
        found.append((stats.steps, stats.vjps, stats.jvps, stats.stored_states, stats.graph_steps))
    assert tuple(found) == expected
