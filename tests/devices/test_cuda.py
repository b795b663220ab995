"""What the stand-in shows, asked of PyTorch itself on a GPU: which operations made the host wait."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import fewshot
from hypertorch.types import Batch, TensorDict
from tests.devices.test_stand_in import ALL_PATHS, BACKENDS, IMAGES, MORE_READS, STEPS, Outer, hypergradient, problem_of
from tests.helpers.stand_in import moved

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _any_algorithm() -> Iterator[None]:
    """cuBLAS refuses to be deterministic without a setting in the environment."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(run: Callable[[], object]) -> int:
    """How many operations waited for the GPU, as PyTorch warns of them."""
    with warnings.catch_warnings(record=True) as caught, sync_debug_mode("warn"):
        warnings.simplefilter("always")
        run()
    return sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reversible", "mixed or not")])
def test_no_inner_step_waits_for_the_gpu(backend: str) -> None:
    counts = []
    for steps in (STEPS, 2 * STEPS):
        unused = () if backend in ALL_PATHS else tuple(problem_of("SGD", steps).init_hparams())
        problem = moved(problem_of("SGD", steps, allow_unused=unused), torch.device("cuda:0"))
        chosen, hparams = BACKENDS[backend](steps), problem.init_hparams()
        hypergradient(problem, chosen, hparams)
        counts.append(waits(lambda: hypergradient(problem, chosen, hparams)))  # noqa: B023
    assert counts == [1 + MORE_READS.get(backend, 0)] * 2


@pytest.mark.parametrize("backend", ["whole graph", "step-wise", "revolve", "Truncated", "FirstOrder"])
def test_a_wait_between_the_first_step_and_the_outer_loss_is_an_error(backend: str) -> None:
    reached = []

    class Watched(Outer):
        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            torch.cuda.set_sync_debug_mode("default")
            reached.append(True)
            return super().loss(params, hparams, batch)

    names = tuple(problem_of("SGD", 1).init_hparams())
    problem = moved(problem_of("SGD", 4, outer=Watched, allow_unused=names), torch.device("cuda:0"))
    chosen, hparams = BACKENDS[backend](4), problem.init_hparams()
    hypergradient(problem, chosen, hparams)  # which looks at what is new
    reached.clear()
    draw = problem.inner.batch

    def watched(step: int) -> Batch:
        # Not while steps are run again: after the last of them the comparisons are read.
        if not reached:
            torch.cuda.set_sync_debug_mode("error")
        return draw(step)

    problem.inner.batch = watched  # type: ignore[method-assign]
    try:
        hypergradient(problem, chosen, hparams)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_data_is_drawn_without_a_wait() -> None:
    sampler = fewshot.EpisodeSampler(IMAGES, way=3, shot=2, num_queries=3, num_tasks=2).to("cuda")
    data = torch.utils.data.TensorDataset(torch.randn(12, 4, device="cuda"), torch.arange(12, device="cuda"))
    minibatches = ht.Minibatches(data, batch_size=6, seed=3)
    sampler.at(0), minibatches(0)
    with sync_debug_mode("error"):
        sampler.at(1), minibatches(1)
