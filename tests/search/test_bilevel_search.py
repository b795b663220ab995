"""Searching the hyperparameters of a bilevel problem: its result, its costs, its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hypertorch as ht
from hypertorch.errors import CheckpointError
from hypertorch.outer.storage.one_writer import one_writer
from hypertorch.types import TensorDict
from tests.search.problems import F64, STARTS, Inner, Outer, outer_loss, problem

REVERSE = ht.hypergradients.Reverse()
BOUNDS = {"l2": (5e-2, 5.0), "shift": (-2.0, 2.0)}


class Counted(Inner):
    """Counts its training runs."""

    def __init__(self) -> None:
        self.runs = 0

    def batch(self, step: int) -> None:
        self.runs += step == 0


def test_the_search_finds_the_minimum_and_says_what_it_cost() -> None:
    found = ht.search.minimise(problem(), BOUNDS, backend=REVERSE, num_evaluations=10, log=("l2",), num_initial=4)
    assert len(found.evaluations) == found.num_with_gradients == 10 and found.num_without_gradients == 0
    assert found.best.outer_loss < 1e-3 and found.gradients_used
    assert found.best_so_far == sorted(found.best_so_far, reverse=True)
    assert found.best_so_far[-1] == found.best.outer_loss
    for evaluation in found.evaluations:
        l2, shift = (evaluation.hparams[name].clone().requires_grad_() for name in ("l2", "shift"))
        expected = outer_loss(l2, shift)
        assert evaluation.outer_loss == pytest.approx(float(expected.detach()), rel=1e-9)
        for grad, own in zip(torch.autograd.grad(expected, (l2, shift)), evaluation.grads.values(), strict=True):
            torch.testing.assert_close(own, grad)
    plain = ht.search.minimise(problem(), BOUNDS, backend=None, num_evaluations=5, log=("l2",), num_initial=4)
    assert (plain.num_with_gradients, plain.num_without_gradients) == (0, 5)
    assert not plain.gradients_used and plain.evaluations[0].grads == {}
    # The first points are the same ones.
    assert plain.evaluations[3].outer_loss == pytest.approx(found.evaluations[3].outer_loss)


def test_what_is_not_searched_stays_at_its_start() -> None:
    found = ht.search.minimise(problem(), {"shift": (-2.0, 2.0)}, backend=REVERSE, num_evaluations=4, num_initial=2)
    for evaluation in found.evaluations:
        assert torch.equal(evaluation.hparams["l2"], STARTS["l2"]) and evaluation.grads.keys() == {"shift"}
    assert found.best.hparams["shift"].shape == () and found.best.hparams["shift"].dtype == F64


class Single(Outer):
    def init_hparams(self) -> TensorDict:
        return {"l2": torch.tensor([0.5, 0.5]), "shift": torch.tensor(0.0)}


def test_hyperparameters_keep_their_dtype() -> None:
    found = ht.search.minimise(problem(outer=Single()), BOUNDS, backend=REVERSE, num_evaluations=1)
    assert {value.dtype for value in found.best.hparams.values()} == {torch.float32}


class Diverging(Inner):
    def loss(self, params, hparams, batch):
        return super().loss(params, hparams, batch) / (hparams["l2"].sum() < 1.0)


@pytest.mark.parametrize("backend", [REVERSE, None])
def test_runs_that_diverge_are_failed_evaluations(backend: ht.Hypergradient | None) -> None:
    own = ht.BilevelProblem(Diverging(), Outer(), dynamics=ht.dynamics.SGD(lr=0.3), num_steps=10)
    found = ht.search.minimise(own, BOUNDS, backend=backend, num_evaluations=7, log=("l2",), num_initial=5)
    failed = [evaluation for evaluation in found.evaluations if evaluation.failed]
    assert failed and len(failed) < 7
    assert all(float(evaluation.hparams["l2"].sum()) >= 1.0 and evaluation.grads == {} for evaluation in failed)
    assert not found.best.failed and found.best_so_far[-1] == found.best.outer_loss
    hopeless = {"l2": (2.0, 3.0)}
    nothing = ht.search.minimise(own, hopeless, backend=backend, num_evaluations=2)
    with pytest.raises(ValueError, match="all 2 evaluations diverged"):
        _ = nothing.best
    assert nothing.best_so_far == [float("inf")] * 2


def test_a_file_of_another_problem_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "search.safetensors"

    def search(own: ht.BilevelProblem, bounds: dict = BOUNDS, **options: object) -> None:
        settings = {"backend": REVERSE, "num_evaluations": 2, "file": file, **options}
        ht.search.minimise(own, bounds, **settings)

    def made(inner: Inner | None = None, outer: Outer | None = None, lr: float = 0.3, num_steps: int = 10):
        sgd = ht.dynamics.SGD(lr=lr)
        return ht.BilevelProblem(inner or Inner(), outer or Outer(), dynamics=sgd, num_steps=num_steps)

    class Moved(Outer):
        def init_hparams(self) -> TensorDict:
            return {**super().init_hparams(), "shift": torch.tensor(0.3, dtype=F64)}

    search(made(outer=Moved()), {"l2": (5e-2, 5.0)})
    for own, words in (
        (made(outer=Moved(), num_steps=3), "`num_steps` is 3, and was 10"),
        (made(outer=Moved(), lr=0.2), "`dynamics.lr` is 0.2, and was 0.3"),
        (made(inner=Counted(), outer=Moved()), "`inner` is .*Counted, and was .*Inner"),
        (made(), "`outer` is .*; `fixed.shift` is|`fixed.shift` is .*; `outer` is"),
    ):
        with pytest.raises(CheckpointError, match=f"was written by another search: .*({words})"):
            search(own, {"l2": (5e-2, 5.0)})
    with pytest.raises(CheckpointError, match=r"`backend\.checkpoint_every` is 2, and was None"):
        search(made(outer=Moved()), {"l2": (5e-2, 5.0)}, backend=ht.hypergradients.Reverse(checkpoint_every=2))
    with pytest.raises(ValueError, match="which is no file"):
        search(made(), file=tmp_path)
    with pytest.raises(TypeError, match="`file` is 3, which is no path"):
        search(made(), file=3)


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    with (
        one_writer(tmp_path, "search.safetensors"),
        pytest.raises(CheckpointError, match="is being written by process"),
    ):
        ht.search.minimise(problem(), BOUNDS, backend=REVERSE, num_evaluations=1, file=tmp_path / "search.safetensors")
    # Another file of the same folder is free meanwhile.
    with one_writer(tmp_path, "search.safetensors"):
        ht.search.minimise(problem(), BOUNDS, backend=REVERSE, num_evaluations=1, file=tmp_path / "other.safetensors")


class Exploding(Inner):
    def loss(self, params, hparams, batch):
        return super().loss(params, hparams, batch) * hparams["l2"].sum().square().clamp(max=40.0)


@pytest.mark.parametrize("backend", [REVERSE, None])
def test_huge_but_finite_losses_are_failed_evaluations(backend: ht.Hypergradient | None) -> None:
    own = ht.BilevelProblem(Exploding(), Outer(), dynamics=ht.dynamics.SGD(lr=0.3), num_steps=60)
    found = ht.search.minimise(own, BOUNDS, backend=backend, num_evaluations=8, num_initial=4)
    assert any(1e100 < evaluation.outer_loss < float("inf") for evaluation in found.evaluations if evaluation.failed)
    assert not found.best.failed


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"shift": 0.1}, r"`bounds\['shift'\]` is 0.1: a search has a least and a greatest value"),
        ({"shift": (0.1, 0.2, 0.3)}, r"`bounds\['shift'\]` is \(0.1, 0.2, 0.3\)"),
        ({"shift": ("a", "b")}, r"`bounds\['shift'\]` is"),
        ({"shift": (None, 1)}, r"`bounds\['shift'\]` is"),
        ([("shift", 0.1)], "`bounds` is .*, which has no names"),
    ],
)
def test_bounds_are_two_numbers_for_each_name(bounds: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ht.search.minimise(problem(), bounds, backend=REVERSE, num_evaluations=1)  # type: ignore[arg-type]


def test_a_search_among_rounded_numbers_is_refused() -> None:
    class Coarse(Outer):
        def init_hparams(self) -> TensorDict:
            return {"l2": torch.tensor([0.5, 0.5]), "shift": torch.tensor(0.0, dtype=torch.bfloat16)}

    with pytest.raises(TypeError, match="`shift` has dtype torch.bfloat16, in which many points"):
        ht.search.minimise(problem(outer=Coarse()), {"shift": (-2.0, 2.0)}, backend=REVERSE, num_evaluations=1)


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    def search(count: int, inner: Counted, file: Path | None) -> ht.search.SearchResult:
        own = ht.BilevelProblem(inner, Outer(), dynamics=ht.dynamics.SGD(lr=0.3), num_steps=10)
        return ht.search.minimise(
            own, BOUNDS, backend=REVERSE, num_evaluations=count, log=("l2",), num_initial=3, file=file
        )

    straight = search(5, Counted(), None)
    file = tmp_path / "search.safetensors"
    search(4, Counted(), file)
    inner = Counted()
    taken_up = search(5, inner, file)
    for own, expected in zip(taken_up.evaluations, straight.evaluations, strict=True):
        assert own.outer_loss == expected.outer_loss
        assert all(torch.equal(own.hparams[name], value) for name, value in expected.hparams.items())
    runs = inner.runs
    assert runs > 0
    # All of it is there: nothing is run.
    search(5, inner, file)
    assert inner.runs == runs
    with pytest.raises(CheckpointError, match=r"another file|other file"):
        ht.search.minimise(problem(), BOUNDS, backend=REVERSE, num_evaluations=6, file=file)
    file.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="search starts anew"):
        search(5, Counted(), file)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"problem": Inner()}, TypeError, "`problem` is a Inner"),
        ({"problem": problem(warm_start=True)}, ValueError, "`warm_start` of the problem is True"),
        ({"num_evaluations": 0}, ValueError, "`num_evaluations` is 0"),
        ({"bounds": {"l3": (0.0, 1.0)}}, ValueError, r"`bounds` names \['l3'\].*\['l2', 'shift'\]"),
        ({"log": ("l3",)}, ValueError, r"`log` names \['l3'\]"),
        ({"log": "l2"}, TypeError, "`log` is 'l2', but it lists names"),
        ({"bounds": {}}, ValueError, "`bounds` has 0 axes"),
        ({"problem": problem(outer=Outer(shift=ht.Positive()))}, ValueError, "`bounds` of `shift`.*excludes -2.0"),
        ({"problem": problem(outer=Outer(l2=ht.Box(upper=4.0)))}, ValueError, "`bounds` of `l2`.*excludes 5.0"),
    ],
)
def test_searches_that_make_no_sense_are_refused(changes: dict, error: type, message: str) -> None:
    arguments = {"problem": problem(), "bounds": BOUNDS, "num_evaluations": 2, "log": ("l2",), **changes}
    if "bounds" in changes:
        arguments["log"] = ()
    with pytest.raises(error, match=message):
        ht.search.minimise(arguments.pop("problem"), arguments.pop("bounds"), backend=REVERSE, **arguments)
