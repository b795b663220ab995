"""How memory grows with the horizon, backend by backend, counted in live tensor bytes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

import hypertorch as ht
from hypertorch.autodiff.live_memory import PeakMemory, storage_bytes
from hypertorch.hypergradients.reverse_mode.revolve import states_alive
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
    bytes_per_step: float = 2 * SCALAR  # the inner loss, of the step and of its replay


REVERSIBLE = ht.dynamics.ReversibleMomentum(lr=0.1, momentum=0.9)
FLAT = {
    "truncated": Flat(backends.Truncated(window=4)),
    "forward": Flat(backends.Forward(chunk_size=20), bytes_per_step=5 * SCALAR),  # for 80 directions
    "forward gradient": Flat(backends.ForwardGradient()),
    "implicit": Flat(backends.Implicit(residual_tolerance=None, stationarity_tolerance=None)),
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
}


@pytest.fixture(autouse=True)
def _without_garbage_collection() -> Iterator[None]:
    """What is freed must be freed by counting references: cycles live until nobody knows when."""
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again
    gc.disable()
    yield
    gc.enable()


def problem_of(num_steps: int, dynamics: ht.Dynamics = SGD) -> ht.BilevelProblem:
    """A net of 20-16-5 on 80 examples: the graph of a step is some eight times a state."""
    return sized_problem(mlp(20, 16, 5), 80, 20, num_steps=num_steps, dynamics=dynamics)


def run(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> tuple[PeakMemory, ht.HypergradientResult]:
    hparams = problem.init_hparams()
    ht.hypergradient(problem, hparams, backend=backend)  # what is probed once for a problem is not the backend's
    with PeakMemory() as memory:
        result = ht.hypergradient(problem, hparams, backend=backend)
    return memory, result


def peak(num_steps: int, case: Flat | ht.Hypergradient) -> int:
    case = case if isinstance(case, Flat) else Flat(case)
    return run(problem_of(num_steps, case.dynamics), case.backend)[0].peak


def one_graph() -> int:
    """The bytes that a further step adds to a graph, by running two in a chain."""
    problem = problem_of(2)
    hparams = {name: value.requires_grad_() for name, value in problem.init_hparams().items()}
    params = problem.inner.init_params(hparams)
    sizes = []
    with PeakMemory() as memory, torch.enable_grad():
        for _ in range(3):
            leaves = {name: value.view_as(value).requires_grad_() for name, value in params.items()}
            loss = problem.inner.loss(leaves, hparams, problem.inner.batch(0))
            grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            params = {name: value - 0.1 * grad for (name, value), grad in zip(leaves.items(), grads, strict=True)}
            kept = loss.detach()
            del leaves, loss, grads
            sizes.append(memory.current)
    assert kept.numel() == 1
    return sizes[2] - sizes[1]


def test_the_whole_graph_grows_by_one_steps_graph_with_every_step() -> None:
    sizes = {num_steps: peak(num_steps, Reverse()) for num_steps in (10, 11, 30)}
    slope = sizes[11] - sizes[10]
    assert slope > 5 * STATE
    assert sizes[30] - sizes[10] == 20 * slope
    assert slope == pytest.approx(one_graph(), abs=4 * SCALAR)


def test_step_wise_grows_by_one_state_with_every_step() -> None:
    step_wise = Reverse(checkpoint_every=1)
    growth = peak(90, step_wise) - peak(30, step_wise)
    assert 60 * STATE <= growth <= 60 * (STATE + 2 * SCALAR)


@pytest.mark.parametrize("every", [5, 10])
def test_checkpoints_grow_by_one_state_with_every_segment(every: int) -> None:
    backend = Reverse(checkpoint_every=every)
    growth = peak(90, backend) - peak(30, backend)
    assert growth == pytest.approx(60 / every * STATE, abs=60 * 2 * SCALAR)


def test_sqrt_grows_as_the_square_root() -> None:
    sizes = [peak(2 * root**2, Reverse(checkpoint_every="sqrt")) for root in (4, 8, 12, 16)]
    slopes = [after - before for before, after in pairwise(sizes)]
    # Eight states and four steps' graphs more for each four of the root: a line in it, so no growth in the slopes.
    for slope in slopes:
        assert slope == pytest.approx(4 * (2 * STATE + peak(11, Reverse()) - peak(10, Reverse())), rel=0.05)


@pytest.mark.slow
def test_sqrt_is_leaner_than_segments_as_long_as_there_are_states() -> None:
    assert peak(200, Reverse(checkpoint_every="sqrt")) == peak(200, Reverse(checkpoint_every=10))
    assert peak(200, Reverse(checkpoint_every="sqrt")) < 0.85 * peak(200, Reverse(checkpoint_every=14))


@pytest.mark.slow
def test_revolve_does_not_grow_with_the_horizon_but_with_the_snapshots() -> None:
    for snapshots in (1, 3):
        growth = peak(40, Reverse(snapshots=snapshots)) - peak(12, Reverse(snapshots=snapshots))
        assert 0 <= growth <= 30 * 2 * SCALAR
    sizes = {snapshots: peak(30, Reverse(snapshots=snapshots)) for snapshots in (1, 3, 6)}
    assert states_alive(30, 6) - states_alive(30, 1) == 5
    assert sizes[3] - sizes[1] == pytest.approx(2 * STATE, abs=100)
    assert sizes[6] - sizes[1] == pytest.approx(5 * STATE, abs=100)


def test_a_budget_holds_whatever_the_horizon() -> None:
    least = peak(20, Reverse(snapshots=1))
    for num_steps in (5, 20, 80):
        assert peak(num_steps, Reverse(memory_budget=least + 2 * STATE)) <= least + 2 * STATE + 80 * 2 * SCALAR


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FLAT)
def test_memory_is_flat_in_the_horizon(name: str) -> None:
    case = FLAT[name]
    peak(12, case)  # the first run in forward mode is compared with reverse mode
    short, long = peak(12, case), peak(48, case)
    assert 0 <= long - short <= 36 * case.bytes_per_step
    # The bound could not be kept by holding on to states.
    assert case.bytes_per_step < STATE / 20


def test_truncated_grows_with_its_window() -> None:
    slope = peak(11, Reverse()) - peak(10, Reverse())
    sizes = {window: peak(20, backends.Truncated(window=window)) for window in (2, 4, 12)}
    assert sizes[4] - sizes[2] == pytest.approx(2 * slope, rel=0.01)
    assert sizes[12] - sizes[4] == pytest.approx(8 * slope, rel=0.01)


def test_a_plain_unroll_keeps_one_state() -> None:
    def unroll_peak(num_steps: int) -> int:
        problem = problem_of(num_steps)
        ht.unroll(problem, problem.init_hparams())  # which looks at the kind of problem
        with PeakMemory() as memory:
            ht.unroll(problem, problem.init_hparams())
        return memory.peak

    short, long = unroll_peak(10), unroll_peak(50)
    assert 0 <= long - short <= 40 * 2 * SCALAR


EVERY = {**FLAT, **{name: Flat(backend) for name, backend in GROWING.items()}}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", EVERY)
def test_after_a_call_its_result_is_all_that_lives(name: str) -> None:
    memory, result = run(problem_of(10, EVERY[name].dynamics), EVERY[name].backend)
    tensors = [result.outer_loss, *result.grads.values(), *result.params.values(), *result.figures.values()]
    assert memory.current == storage_bytes(tensors)
    del result, tensors
    assert memory.current == 0


@pytest.mark.parametrize("name", EVERY)
def test_memory_is_flat_over_outer_steps(name: str) -> None:
    problem = problem_of(6, EVERY[name].dynamics)
    values = problem.init_hparams()
    sizes = []
    with PeakMemory() as memory:
        for outer_step in range(10):
            memory.reset_peak()
            result = ht.hypergradient(problem, values, backend=EVERY[name].backend, outer_step=outer_step)
            values = {name: value - 0.1 * result.grads[name] for name, value in values.items()}
            del result
            sizes.append((memory.current, memory.peak))
    assert len(set(sizes[2:])) == 1


class _FreshBatch(LambdaOuter):
    """Its data are new tensors at every outer step."""

    def batch(self, outer_step: int) -> Batch:
        return torch.full((5000,), float(outer_step))


def test_outer_data_go_with_the_outer_step() -> None:
    hparams = {"c": torch.tensor(1.0)}
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.zeros(3)}, lambda p, h, b: (p["w"] - h["c"]).square().sum()),
        _FreshBatch(hparams, lambda p, h, b: p["w"].sum() + b.mean()),
        dynamics=SGD,
        num_steps=3,
    )
    with PeakMemory() as memory:
        for outer_step in range(4):
            ht.hypergradient(problem, hparams, backend=Reverse(), outer_step=outer_step)
    assert memory.current == 0
