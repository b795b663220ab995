"""Reptile's minibatches: which examples each inner step fits, and that the outer loop learns from just these."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.fewshot import Episode, Examples, Reptile
from hypertorch.types import TensorDict
from tests.fewshot.learners.test_learners import Blobs
from tests.fewshot.learners.test_methods import assert_same, network
from tests.helpers.problems import normal

SGD = ht.dynamics.SGD
backends = ht.hypergradients
WAY = 3


def reptile(batch_size: int | None, num_steps: int = 5, dynamics: ht.Dynamics | None = None) -> Reptile:
    return Reptile(network(), dynamics=dynamics or SGD(lr=0.2), num_steps=num_steps, batch_size=batch_size)


def numbered(num_tasks: int | None, shot: int, way: int = WAY) -> Examples:
    """Support sets ordered by class whose inputs say task and example."""
    number = torch.arange(way * shot, dtype=torch.float64)
    labels = torch.arange(way).repeat_interleave(shot)
    if num_tasks is None:
        return Examples(number[:, None].expand(-1, 16), labels)
    task = 1000.0 * torch.arange(num_tasks, dtype=torch.float64)
    return Examples((task[:, None] + number)[..., None].expand(-1, -1, 16), labels.expand(num_tasks, -1))


def drawn(learner: Reptile, support: Examples, num_tasks: int | None, step: int) -> Examples:
    """The batch of an inner step, from the problem and not from the hook."""
    return learner.problem(Episode(support, support), num_tasks).inner.batch(step)  # type: ignore[return-value]


@pytest.mark.parametrize("num_tasks", [None, 1, 4])
@pytest.mark.parametrize(("shot", "batch_size"), list(itertools.product([1, 2, 3, 5, 10], [1, 2, 4, 6, 7, 30, 100])))
def test_each_example_is_used_once_per_pass(num_tasks: int | None, shot: int, batch_size: int) -> None:
    learner, support = reptile(batch_size), numbered(num_tasks, shot)
    count = WAY * shot
    num_batches = math.ceil(count / batch_size)
    for first in (0, num_batches):  # the second pass is the first one again
        used: list[float] = []
        for step in range(first, first + num_batches):
            inputs, targets = drawn(learner, support, num_tasks, step)
            assert inputs.shape == (*targets.shape, 16)
            rows = inputs[..., 0].reshape(num_tasks or 1, -1)
            size = rows.shape[1]
            assert count // num_batches <= size <= min(batch_size, -(-count // num_batches))
            numbers = rows.remainder(1000.0)
            assert (rows - numbers == 1000.0 * torch.arange(num_tasks or 1)[:, None]).all()  # each task its own
            assert (numbers == numbers[0]).all()
            assert torch.equal(targets.reshape(numbers.shape), numbers.long() // shot)  # inputs keep their labels
            used += numbers[0].tolist()
        assert sorted(used) == list(range(count))


@pytest.mark.parametrize(("way", "shot", "batch_size"), [(3, 10, 15), (5, 10, 10), (5, 15, 25), (2, 6, 4), (20, 5, 20)])
def test_minibatches_hold_equally_many_of_each_class_where_they_divide(way: int, shot: int, batch_size: int) -> None:
    """With `m` minibatches, `m` a divisor of the shots: the sizes of the published settings, 5-way with 10 at once."""
    support = numbered(None, shot, way)
    num_batches = way * shot // batch_size
    assert shot % num_batches == 0
    for step in range(num_batches):
        classes = Counter(drawn(reptile(batch_size), support, None, step).targets.tolist())
        assert classes == dict.fromkeys(range(way), batch_size // way)


@pytest.mark.parametrize(("shot", "batch_size"), [(5, 4), (7, 6), (10, 7), (3, 2)])
def test_uneven_minibatches_differ_by_one_example_of_a_class(shot: int, batch_size: int) -> None:
    support = numbered(None, shot)
    for step in range(math.ceil(WAY * shot / batch_size)):
        classes = Counter(drawn(reptile(batch_size), support, None, step).targets.tolist())
        counts = [classes[label] for label in range(WAY)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("num_tasks", [None, 2])
def test_without_a_batch_size_each_step_fits_the_whole_support_set(num_tasks: int | None) -> None:
    support = numbered(num_tasks, 4)
    for step in range(3):
        batch = drawn(reptile(None), support, num_tasks, step)
        assert batch.inputs is support.inputs and batch.targets is support.targets


def test_a_batch_as_large_as_the_support_set_is_the_support_set() -> None:
    def grads(batch_size: int | None) -> TensorDict:
        source = reptile(batch_size).on(Blobs())
        return ht.hypergradient(source.at(0), source.init_hparams(), backend=backends.Reverse()).grads

    whole = grads(None)
    for batch_size in (6, 1000):
        assert_same(grads(batch_size), whole)
    assert not torch.allclose(grads(3)["layers.1.weight"], whole["layers.1.weight"], rtol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_the_hypergradient_is_that_of_a_hand_written_loop(batch_size: int, route: str) -> None:
    """Reptile's update `theta - w_k`, with Adam without first momentum on minibatches, both by PyTorch alone."""
    num_steps, count = 5, 6
    rule = ht.dynamics.Adam(lr=0.01, beta1=0.0)
    source = reptile(batch_size, num_steps, rule).on(Blobs())
    hparams, episode = source.init_hparams(), Blobs().at(0)
    num_batches = math.ceil(count / batch_size)
    passes = [list(range(start, count, num_batches)) for start in range(num_batches)]

    expected = {name: torch.zeros_like(value) for name, value in hparams.items()}
    for inputs, targets in zip(*episode.support, strict=True):
        module = network()
        module.load_state_dict(hparams)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01, betas=(0.0, 0.999))
        for chosen in itertools.islice(itertools.cycle(passes), num_steps):
            optimizer.zero_grad()
            F.cross_entropy(module(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
        for name, value in module.named_parameters():
            expected[name] += (hparams[name] - value.detach()) / len(episode.support.inputs)

    execution = ht.Execution(tasks=route)  # type: ignore[arg-type]
    for backend in (backends.Reverse(), backends.FirstOrder(), backends.Truncated(window=1)):
        assert_same(ht.hypergradient(source.at(0), hparams, backend=backend, execution=execution).grads, expected)


def test_adapting_takes_the_same_minibatches() -> None:
    learner, episode = reptile(2), Blobs(num_tasks=1).at(3)
    hparams = learner.init_hparams()
    inputs, targets = episode.support.inputs[0], episode.support.targets[0]
    module = network()
    module.load_state_dict(hparams)
    for step in range(5):
        chosen = slice(step % 3, None, 3)
        loss = F.cross_entropy(module(inputs[chosen]), targets[chosen])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.2 * gradient
    query = episode.query.inputs[0]
    torch.testing.assert_close(learner.adapt(hparams, Examples(inputs, targets))(query), module(query).detach())


def test_regression_targets_are_cut_with_their_inputs() -> None:
    support = Examples(normal(2, 6, 1, seed=1), normal(2, 6, 1, seed=2))
    batch = drawn(reptile(4), support, 2, 1)
    assert torch.equal(batch.inputs, support.inputs[:, 1::2]) and torch.equal(batch.targets, support.targets[:, 1::2])


def test_figures_of_the_inner_loss_are_of_the_whole_support_set() -> None:
    """What asks how far the inner loop came (`full_batch`) asks about the task, not about a minibatch."""
    support = numbered(2, 4)
    inner = reptile(2).problem(Episode(support, support), 2).inner
    assert inner.full_batch() is support


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_without_examples_is_refused(batch_size: int) -> None:
    message = (
        rf"`batch_size` must be at least 1, got {batch_size}: an inner step needs examples\. Use 1 or more, or None"
    )
    with pytest.raises(ValueError, match=message):
        reptile(batch_size)


@pytest.mark.parametrize("batch_size", [2.5, True, "10"])
def test_a_batch_size_that_is_no_whole_number_is_refused(batch_size: object) -> None:
    with pytest.raises(TypeError, match=r"`batch_size` is .*: an inner step needs examples\. Pass an integer"):
        reptile(batch_size)  # type: ignore[arg-type]
