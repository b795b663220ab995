"""What a run that goes back step by step counts and gathers: steps, states, losses."""

from __future__ import annotations

import math

import pytest
import torch

import hypertorch as ht
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.reverse_mode.revolve import recomputed_steps
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict
from tests.helpers.problems import net_problem

Reverse = ht.hypergradients.Reverse


class Watching(Reverse):
    """Keeps the loop that it was handed."""

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        self.loops.append(loop)
        return super().compute(loop, variables)

    @property
    def loops(self) -> list[InnerLoop]:
        return self.__dict__.setdefault("_loops", [])


def watched(num_steps: int, **kept: int) -> tuple[ht.HypergradientResult, InnerLoop, torch.Tensor]:
    """Returns the result in mixed mode, its loop, and the inner loss before each step."""
    problem = net_problem(ht.dynamics.SGD(lr=0.3, momentum=0.5), {}, num_steps=num_steps, dropout=0.4)
    hparams = problem.init_hparams()
    backend = Watching(derivative="mixed", **kept)
    result = ht.hypergradient(problem, hparams, backend=backend)
    return result, backend.loops[0], ht.unroll(problem, hparams).inner_losses


@pytest.mark.parametrize(
    "kept", [{}, {"checkpoint_every": 1}, {"checkpoint_every": 4}, {"checkpoint_every": 11}, {"snapshots": 2}], ids=str
)
def test_one_loss_is_kept_for_each_step_however_often_it_is_run(kept: dict[str, int]) -> None:
    _, loop, by_step = watched(11, **kept)
    losses = loop.record.losses
    assert losses.keys() == set(range(11))
    found = torch.stack([losses[step] for step in range(11)])
    torch.testing.assert_close(found, by_step, rtol=1e-12, atol=0)


@pytest.mark.parametrize("every", [1, 2, 3, 5, 10, 11])
def test_states_between_two_kept_ones_are_counted_with_those_that_are_kept(every: int) -> None:
    num_steps = 11
    stats = watched(num_steps, checkpoint_every=every)[0].stats
    pieces = math.ceil(num_steps / every)
    assert stats.stored_states == pieces + every
    # All but the last step of each piece but the last are run once more, beside the step of each vjp.
    assert stats.steps == num_steps + (num_steps - every - (pieces - 1)) + num_steps
    assert (stats.vjps, stats.graph_steps) == (num_steps, 1)


@pytest.mark.parametrize("snapshots", [1, 3, 11])
def test_the_binomial_schedule_counts_the_states_that_it_keeps_and_the_last(snapshots: int) -> None:
    stats = watched(11, snapshots=snapshots)[0].stats
    assert stats.stored_states == snapshots + 1
    # The last step is differentiated where it is first run.
    assert stats.steps == recomputed_steps(11, snapshots) + 11
