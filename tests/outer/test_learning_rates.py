"""Outer variables with learning rates of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import hypertorch as ht
from hypertorch.errors import CheckpointError
from tests.outer.problems import Quadratics
from tests.outer.runs import assert_same_run, full_loop, make_loop


def test_outer_variables_with_learning_rates_of_their_own() -> None:
    """Each moves as it does alone with its rate: gradient descent by hand."""
    start = Quadratics().init_hparams()
    grads = ht.hypergradient(Quadratics().at(0), start, backend=ht.hypergradients.Reverse()).grads
    memory = ht.MemoryLogger()
    trained = make_loop(learning_rates={"curv*": 0.02}, loggers=[memory]).run(1)
    rates = {"start": 0.1, "curvature": 0.02}
    expected = {name: value - rates[name] * grads[name] for name, value in start.items()}
    torch.testing.assert_close(trained.hparams, expected)
    assert (memory.records[0]["learning_rate/0"], memory.records[0]["learning_rate/1"]) == (0.1, 0.02)


def test_a_name_wins_over_a_pattern_and_a_schedule_scales_every_rate() -> None:
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    memory = ht.MemoryLogger()
    rates = {"*": 0.2, "curvature": 0.04}
    make_loop(learning_rates=rates, scheduler=scheduler, loggers=[memory]).run(2)
    assert [[record["learning_rate/0"], record["learning_rate/1"]] for record in memory.records] == [
        [0.2, 0.04],
        [0.1, 0.02],
    ]


def test_a_run_with_several_learning_rates_resumes_bit_for_bit(tmp_path: Path) -> None:
    rates = {"curvature": 0.01}
    whole = full_loop(tmp_path / "whole", learning_rates=rates).run(12)
    full_loop(tmp_path / "parts", learning_rates=rates).run(6)
    assert_same_run(whole, full_loop(tmp_path / "parts", learning_rates=rates).run(12, resume=True))
    with pytest.raises(CheckpointError, match=r"`learning_rates\.curvature` is absent, and was 0\.01\. It would"):
        full_loop(tmp_path / "parts").run(14, resume=True)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), True, "0.1"])
def test_a_learning_rate_is_a_number_of_at_least_0(rate: object) -> None:
    with pytest.raises(ValueError, match=r"`learning_rates\['curvature'\]` is .*: it is the step size"):
        make_loop(learning_rates={"curvature": rate})


def test_learning_rates_that_reach_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`learning_rates` has the entry 'curve', which matches none of"):
        make_loop(learning_rates={"curve": 0.1}).run(1)

    def flat(groups: list) -> torch.optim.Optimizer:
        return torch.optim.SGD([tensor for group in groups for tensor in group["params"]], lr=0.1)

    with pytest.raises(ValueError, match="`learning_rates` are not taken by the SGD that `optimizer` returned"):
        make_loop(optimizer=flat, learning_rates={"curvature": 0.2}).run(1)


def test_the_state_of_a_rate_is_not_handed_to_another_variable(tmp_path: Path) -> None:
    full_loop(tmp_path, learning_rates={"curvature": 0.01}).run(6)
    for other in ({"start": 0.01}, {"curvature": 0.02}, None):
        with pytest.raises(CheckpointError, match=r"`learning_rates\.curvature` is (absent|0\.02), and was 0\.01"):
            full_loop(tmp_path, learning_rates=other).run(12, resume=True)


def test_an_entry_that_never_wins_is_refused() -> None:
    for rates in ({"*": 0.1, "cur*": 0.2}, {"curv*": 0.1, "curvature": 0.2}):
        with pytest.raises(ValueError, match="`learning_rates` has the entry .*, before which others win"):
            make_loop(learning_rates=rates).run(1)


def test_a_scheduler_that_sets_rates_itself_is_refused() -> None:
    one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=20)
    for rates in ({"curvature": 0.02}, {"curvature": 0.0}):
        with pytest.raises(ValueError, match="`scheduler` returned a OneCycleLR that sets learning rates itself"):
            make_loop(learning_rates=rates, scheduler=one_cycle).run(1)
    warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: min(1.0, step / 3))
    make_loop(learning_rates={"curvature": 0.02}, scheduler=warm_up).run(2)


@pytest.mark.parametrize("rates", [0.1, [0.1], {1: 0.1}])
def test_learning_rates_are_a_mapping_from_names(rates: object) -> None:
    with pytest.raises(TypeError, match="`learning_rates` is "):
        make_loop(learning_rates=rates)
