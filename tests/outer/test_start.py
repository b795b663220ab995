"""A run that starts from given outer variables, such as those of another run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from hypertorch.types import TensorDict
from tests.outer.problems import Quadratics
from tests.outer.runs import assert_same_run, full_loop, make_loop


def test_two_runs_of_gradient_descent_are_one() -> None:
    # The problems are the same at every step and plain descent has no state: 3 and 4 steps make 7.
    problem = Quadratics().at(0)
    first = make_loop(problem).run(3)
    torch.testing.assert_close(
        make_loop(problem).run(4, start_from=first.hparams).hparams, make_loop(problem).run(7).hparams
    )


def test_their_own_start_changes_nothing() -> None:
    assert_same_run(make_loop().run(3, start_from=Quadratics().init_hparams()), make_loop().run(3))


def test_the_given_ones_stay_untouched_and_their_order_does_not_matter() -> None:
    given = {name: value + 0.1 for name, value in reversed(Quadratics().init_hparams().items())}
    before = {name: value.clone() for name, value in given.items()}
    trained = make_loop(optimizer=partial(torch.optim.Adam, lr=0.1)).run(2, start_from=given)
    assert list(trained.hparams) == list(Quadratics().init_hparams())
    torch.testing.assert_close(given, before, rtol=0.0, atol=0.0)


def test_a_run_that_goes_on_takes_its_checkpoint(tmp_path: Path) -> None:
    start = {name: value + 0.1 for name, value in Quadratics().init_hparams().items()}
    straight = full_loop(tmp_path / "straight").run(12, start_from=start)
    full_loop(tmp_path / "stopped").run(6, start_from=start)
    assert_same_run(full_loop(tmp_path / "stopped").run(12, start_from=start, resume=True), straight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: dict(list(own.items())[1:]), r"absent in `start_from`, float64 .* in the problem"),
        (lambda own: {**own, "spare": torch.ones(2)}, r"`spare` \(float32 \(2,\) in `start_from`, absent "),
        (lambda own: {name: value.float() for name, value in own.items()}, r"float32 .* in `start_from`, float64 "),
        (lambda own: {name: value.expand(3, *value.shape) for name, value in own.items()}, r"\(3,.* in `start_from`"),
        (lambda own: {}, r"`hparams` is empty"),
    ],
)  # fmt: skip
def test_outer_variables_of_another_problem_are_refused(change: object, message: str) -> None:
    given: TensorDict = change(Quadratics().init_hparams())  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match=message):
        make_loop().run(1, start_from=given)


def test_a_path_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`hparams` is .*flat dict from names to tensors"):
        make_loop().run(1, start_from="run/checkpoints")  # pyright: ignore[reportArgumentType]
