"""How many trials run how far: the published table, the savings in closed form, and what is refused."""

from __future__ import annotations

import pytest

from hypertorch.search import hyperband, successive_halving
from hypertorch.search.halving import kept, rungs


def test_the_brackets_are_those_of_the_paper() -> None:
    """Li et al. (2018), table 1: R = 81, eta = 3, in units of one."""
    brackets = hyperband(1, 81, 3)
    assert [bracket.steps for bracket in brackets] == [
        (1, 3, 9, 27, 81),
        (3, 9, 27, 81),
        (9, 27, 81),
        (27, 81),
        (81,),
    ]
    # The paper's table has 27 and 9 in the second and third bracket's first rung, its algorithm 1 what stands here.
    assert [bracket.sizes for bracket in brackets] == [
        (81, 27, 9, 3, 1),
        (34, 11, 3, 1),
        (15, 5, 1),
        (8, 2),
        (5,),
    ]


@pytest.mark.parametrize(("rung", "saved"), [((27, 2187, 3), 0.17), ((10, 160, 2), 0.25), ((10, 2560, 2), 0.335)])
def test_going_on_saves_as_much_as_computed_before(rung: tuple[int, int, int], saved: float) -> None:
    brackets = hyperband(*rung)
    continued = sum(bracket.continued_steps for bracket in brackets)
    restarted = sum(bracket.restarted_steps for bracket in brackets)
    assert 1 - continued / restarted == pytest.approx(saved, abs=0.006)
    # In one bracket at most 1 / eta: each rung repeats at most the share 1 / eta of its own length.
    for bracket in brackets:
        assert 1 - bracket.continued_steps / bracket.restarted_steps <= 1 / rung[2]


def test_one_bracket_by_hand() -> None:
    bracket = successive_halving(9, 10, 40, 2)
    assert bracket.sizes == (9, 4, 2) and bracket.steps == (10, 20, 40)
    assert bracket.continued_steps == 9 * 10 + 4 * 10 + 2 * 20
    assert bracket.restarted_steps == 9 * 10 + 4 * 20 + 2 * 40
    assert successive_halving(2, 1, 8, 2).sizes == (2, 1, 1, 1)


@pytest.mark.parametrize("arguments", [(0, 8, 2), (2, 8, 1), (4, 2, 2)])
def test_numbers_without_rungs_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"`min_steps` is \d.*no rungs between.*Pass"):
        rungs(*arguments)


def test_a_length_that_is_no_rung_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leave out the length 100.*Let the length be 80 or 160"):
        rungs(10, 100, 2)
    with pytest.raises(ValueError, match=r"`num_trials` is 0"):
        successive_halving(0, 1, 2, 2)


def test_the_best_are_kept_and_of_equal_ones_the_first() -> None:
    values = [0.2, 0.5, 0.1, 0.5]
    assert kept(values, 2, maximise=True) == [1, 3]
    assert kept(values, 1, maximise=True) == [1]
    assert kept(values, 2, maximise=False) == [0, 2]
    assert kept(values, 9, maximise=False) == [0, 1, 2, 3]
