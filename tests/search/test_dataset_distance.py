"""Learnt distances between data sets: what they must not depend on, their derivative, and that they are learnt."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from tests.helpers.problems import normal


def network(num_inputs: int = 3, *, width: int = 5, num_outputs: int = 2) -> ht.search.DeepSet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ht.search.DeepSet(num_inputs, width=width, num_outputs=num_outputs).double()


def some_sets() -> list[Tensor]:
    return [normal(size, 3, seed=size) for size in (4, 1, 6, 3)]


def embedded(sets: list[Tensor]) -> Tensor:
    return network()(*ht.search.pad_sets(sets))


def test_order_of_examples_does_not_matter() -> None:
    sets = some_sets()
    shuffled = [examples[normal(len(examples), seed=9).argsort()] for examples in sets]
    assert not torch.equal(sets[0], shuffled[0])
    torch.testing.assert_close(embedded(shuffled), embedded(sets), rtol=1e-12, atol=1e-12)


def test_an_embedding_is_that_of_a_set_alone() -> None:
    """Neither the other sets nor the rows that fill up take part, whatever stands there."""
    sets = some_sets()
    together = embedded(sets)
    for own, found in zip(sets, together, strict=True):
        torch.testing.assert_close(embedded([own])[0], found, rtol=1e-12, atol=1e-12)
    examples, sizes = ht.search.pad_sets(sets)
    for position, size in enumerate(sizes.tolist()):
        examples[position, size:] = torch.inf
    torch.testing.assert_close(network()(examples, sizes), together, rtol=1e-12, atol=1e-12)


def test_an_embedding_is_the_formula() -> None:
    net, own = network(), some_sets()[0]
    mean = torch.stack([net.features(example) for example in own]).mean(dim=0)
    expected = net.outputs(torch.cat([mean, torch.tensor([4.0], dtype=torch.float64).log()]))
    torch.testing.assert_close(net(*ht.search.pad_sets([own]))[0], expected)


def test_the_number_of_examples_is_seen() -> None:
    """Each example twice has the same mean, but is another data set."""
    own = some_sets()[0]
    once, twice = embedded([own]), embedded([own.repeat(2, 1)])
    assert (once - twice).abs().max() > 1e-3
    # Of a set that is larger than the rows, the rows are a sample.
    torch.testing.assert_close(network()(own[None], torch.tensor([8])), twice)


def test_distances_are_distances() -> None:
    distance = ht.search.DatasetDistance(network())
    weights, sets = distance.init_hparams(), some_sets()
    # More than 25 rows, where PyTorch would go by products, which lose digits.
    many = sets * 8
    found = distance(weights, many, many)
    torch.testing.assert_close(found, found.T)
    assert torch.equal(found.diagonal(), torch.zeros(32, dtype=torch.float64))
    points = distance.embeddings(weights, sets)
    assert float(found[0, 2]) == pytest.approx(float((points[0] - points[2]).norm()))


def test_true_distances_by_hand() -> None:
    losses = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    others = torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, 2.0]])
    expected = torch.tensor([[0.0, 1.5, 0.5], [1.25, 2.25, 1.75]])
    torch.testing.assert_close(ht.search.loss_distances(losses, others), expected)


@pytest.mark.parametrize("num_examples", [None, 2])
def test_the_hypergradient_is_that_of_central_differences(num_examples: int | None) -> None:
    distance = ht.search.DatasetDistance(network())
    problem = distance.problem(some_sets(), normal(4, 3, seed=1), batch_size=3, num_examples=num_examples)
    # Steps that are small enough to meet no kink of a unit.
    check = ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse(), step_size=1e-6)
    assert check.passed


def test_the_outer_loss_is_the_mean_over_pairs() -> None:
    distance, sets, losses = ht.search.DatasetDistance(network()), some_sets(), normal(4, 3, seed=1)
    weights = distance.init_hparams()
    learnt, true = distance(weights, sets, sets), ht.search.loss_distances(losses, losses)
    errors = [(learnt[i, j] - true[i, j]) ** 2 for i, j in combinations(range(4), 2)]
    problem = distance.problem(sets, losses, batch_size=4)
    found = ht.hypergradient(problem, weights, backend=ht.hypergradients.Reverse()).outer_loss
    torch.testing.assert_close(found, torch.stack(errors).mean())


def test_equal_sets_have_a_derivative() -> None:
    distance, own = ht.search.DatasetDistance(network()), some_sets()[0]
    problem = distance.problem([own, own], normal(2, 3, seed=1), batch_size=2)
    result = ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse())
    assert all(bool(grad.isfinite().all()) for grad in result.grads.values())


def test_a_step_draws_each_set_once_and_its_own_examples() -> None:
    sets = [torch.full((size, 3), float(size), dtype=torch.float64) for size in (4, 1, 6, 3)]
    distance, losses = ht.search.DatasetDistance(network()), normal(4, 3, seed=1)
    outer = distance.problem(sets, losses, batch_size=3, num_examples=5).outer
    seen = set()
    for step in range(20):
        examples, sizes, *_ = outer.batch(step)
        assert torch.equal(examples, outer.batch(step)[0])
        assert torch.equal(examples, sizes[:, None, None].double().expand(3, 5, 3))
        assert len(set(sizes.tolist())) == 3
        seen |= set(sizes.tolist())
    assert seen == {4, 1, 6, 3}


def test_a_distance_that_can_be_learnt_is() -> None:
    """Data sets that differ in their scale alone, as do their losses: unseen ones are told apart."""
    scales = torch.linspace(0.5, 3.0, 24, dtype=torch.float64)
    sets = [scale * normal(60, 2, seed=place) for place, scale in enumerate(scales)]
    losses = torch.stack([scales, 2 * scales], dim=1)
    distance = ht.search.DatasetDistance(network(2, width=16))
    loop = ht.OuterLoop(
        distance.problem(sets[::2], losses[::2], batch_size=8),
        optimizer=lambda hparams: torch.optim.Adam(hparams, lr=1e-2),
        backend=ht.hypergradients.Reverse(),
    )
    weights = loop.run(150).hparams
    learnt, true = distance(weights, sets[1::2], sets[::2]), ht.search.loss_distances(losses[1::2], losses[::2])
    pairs = torch.stack([learnt.flatten(), true.flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ht.search.DeepSet(0), "`num_inputs` is 0"),
        (lambda: ht.search.DeepSet(3, width=True), "`width` is True"),
        (lambda: ht.search.pad_sets([]), "`sets` is empty"),
        (lambda: ht.search.pad_sets([torch.ones(2, 3), torch.ones(2, 4)]), r"`sets\[1\]` has the shape \(2, 4\)"),
        (lambda: ht.search.pad_sets([torch.ones(0, 3)]), r"`sets\[0\]` has the shape \(0, 3\)"),
        (lambda: ht.search.pad_sets([torch.full((1, 2), torch.nan)]), r"`sets\[0\]` holds NaN or infinity"),
        (lambda: ht.search.loss_distances(torch.ones(2, 3), torch.ones(2, 4)), "have 3 and 4 configurations"),
        (lambda: ht.search.loss_distances(torch.ones(2, 3), torch.full((1, 3), torch.inf)), "`others` holds NaN"),
        (lambda: ht.search.loss_distances(torch.ones(3), torch.ones(2, 3)), r"`losses` has the shape \(3,\)"),
    ],
)
def test_what_cannot_work_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (3, {}, "`losses` has 3 rows, but there are 4 data sets"),
        (4, {"batch_size": 1}, "`batch_size` is 1"),
        (4, {"batch_size": 5}, "`batch_size` is 5"),
        (4, {"batch_size": 3, "num_examples": 0}, "`num_examples` is 0"),
    ],
)
def test_a_problem_that_cannot_work_is_refused(rows: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ht.search.DatasetDistance(network()).problem(some_sets(), normal(rows, 3, seed=1), **options)


def test_a_network_is_a_module() -> None:
    with pytest.raises(TypeError, match="`module` is a str"):
        ht.search.DatasetDistance("network")  # type: ignore[arg-type]
