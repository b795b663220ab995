"""The space of a search: what each form of the command line means, its ends, conditions and grid, and what is "
"refused."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hydra_plugins.hypertorch_search._space import Space, overrides_of, read_space

optuna.logging.set_verbosity(optuna.logging.ERROR)
FORMS = {
    "tag(log,interval(1e-4,1e-1))": FloatDistribution(1e-4, 1e-1, log=True),
    "interval(0,1)": FloatDistribution(0.0, 1.0),
    "int(interval(1,8))": IntDistribution(1, 8),
    "int(interval(1.0,8e0))": IntDistribution(1, 8),
    "tag(log,int(interval(1,8)))": IntDistribution(1, 8, log=True),
    "range(1,8)": IntDistribution(1, 7),
    "range(1,8,3)": IntDistribution(1, 7, step=3),
    "range(8,1,-3)": IntDistribution(2, 8, step=3),
    "tag(log,range(1,100))": IntDistribution(1, 99, log=True),
    "range(0.1,0.35,0.1)": FloatDistribution(0.1, 0.3, step=0.1),
    "a,b": CategoricalDistribution(("a", "b")),
    "choice(1,2,4)": CategoricalDistribution(("1", "2", "4")),
    "[1,2],[3]": CategoricalDistribution(("[1,2]", "[3]")),
}


def space(*words: str, conditions: Mapping[str, str] | None = None) -> Space:
    return read_space(OverridesParser.create().parse_overrides(list(words)), conditions or {})


@pytest.mark.parametrize("text", FORMS)
def test_each_form_of_the_command_line(text: str) -> None:
    found = space(f"x={text}").distributions
    expected = FORMS[text]
    if isinstance(expected, FloatDistribution) and expected.step is not None:
        assert isinstance(found["x"], FloatDistribution)
        assert found["x"].high == pytest.approx(expected.high) and found["x"].step == expected.step
    else:
        assert found == {"x": expected}


def drawn(one: Space, seed: int = 0) -> dict[str, object]:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    return dict(one.suggest(trial))


def conditional() -> Space:
    # What the condition names may stand behind.
    return space(
        "lr_after=range(1,4)",
        "nesterov=true,false",
        "rule=sgd,adam,lion",
        conditions={"nesterov": "rule=sgd,lion", "lr_after": "nesterov=true"},
    )


def test_a_setting_under_a_condition_is_left_out_elsewhere() -> None:
    seen = set()
    for seed in range(40):
        point = drawn(conditional(), seed)
        assert ("nesterov" in point) == (point["rule"] in ("sgd", "lion"))
        assert ("lr_after" in point) == (point.get("nesterov") == "True")
        seen.add(tuple(point))
    assert len(seen) == 3


def test_the_ends_have_every_choice_and_both_ends_of_each_range() -> None:
    points = conditional().ends()
    for name, values in {"rule": {"sgd", "adam", "lion"}, "nesterov": {"True", "False"}, "lr_after": {1, 3}}.items():
        assert {point[name] for point in points if name in point} == values
    assert {"rule": "adam"} in points
    assert len(points) == len({tuple(point.items()) for point in points})


def test_the_grid_has_each_point_once() -> None:
    # sgd and lion: nesterov true with three lengths, and false; adam alone.
    assert len(conditional().grid()) == 2 * (3 + 1) + 1
    assert len(space("a=1,2", "b=range(0.1,0.35,0.1)").grid()) == 6
    with pytest.raises(ValueError, match=r"`lr` is an interval, but `hydra.sweeper.sampler` is 'grid'"):
        space("a=1,2", "lr=interval(0,1)").grid()


def test_a_point_of_the_grid_is_what_a_trial_draws() -> None:
    one = space("b=range(0.1,0.35,0.1)", "a=1,2")
    study = optuna.create_study()
    for point in one.grid():
        study.enqueue_trial(point)
    assert [one.suggest(study.ask()) for _ in range(6)] == one.grid()


def test_numbers_are_written_without_loss() -> None:
    assert overrides_of({"x": 0.1 + 0.2, "n": 3, "word": "a"}) == ["x=0.30000000000000004", "n=3", "word=a"]


REFUSED = {
    "x=interval(1,0)": "goes from 1.0 to 0.0, which is no interval",
    "x=interval(1,1)": "holds one value, 1.0: there is nothing to search. Write x=1.0 for all",
    "x=int(interval(3,3))": "holds one value, 3: there is nothing to search. Write x=3 for all",
    "x=int(interval(8.5,9.2))": "has the end 8.5, which is no whole number: it would be cut to 8",
    "x=int(interval(start=8,end=9.5))": "has the end 9.5, which is no whole number: it would be cut to 9",
    "x=tag(log,int(interval(0.5,3)))": "has the end 0.5, which is no whole number",
    "x=int(tag(log,interval(1,2.5)))": "has the end 2.5, which is no whole number",
    "x=interval(0,inf)": "is no interval",
    "x=tag(log,interval(0,1))": "begins at 0.0, which has no logarithm",
    "x=tag(log,range(0,5))": "begins at 0, which has no logarithm",
    "x=tag(log,range(1,9,2))": "the tag log and a step",
    "x=range(3,3)": "holds no number",
    "x=tag(log,choice(1,2))": "lists values, which have no scale",
    "x=tag(lgo,interval(1,2))": "the tag 'lgo'",
    "x=1,1": "lists a value twice",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_nothing_can_be_drawn_from_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[word]):
        space(word)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"b": "a=1"}, "`b` is not searched"),
        ({"x": "b=1"}, "`b` is not searched"),
        ({"x": "a"}, "is not searched"),
        ({"x": "a=3"}, "`a` never is '3': `x` would not be searched there. Its values are 1, 2"),
        ({"a": "x=1"}, "`x` never is '1'.*any in an interval"),
        ({"c": "a=1", "a": "c=1"}, "depend on itself"),
    ],
)
def test_a_condition_that_cannot_hold_is_refused(conditions: dict[str, str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        space("x=interval(0,1)", "a=1,2", "c=1,2", conditions=conditions)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"lr": 0.5}, {"lr": 0.5}),
        ({"lr": 1, "width": 4.0}, {"lr": 1, "width": 4}),
        ({"rule": "sgd"}, {"rule": "sgd"}),
        ({"nesterov": True}, {"nesterov": "True"}),
    ],
)
def test_a_point_to_begin_with_is_read_as_it_is_searched(table: dict, expected: dict) -> None:
    own = space("lr=interval(0,1)", "width=int(interval(1,8))", "rule=sgd,adam", "nesterov=true,false")
    found = own.start(table)
    assert found == expected and [type(value) for value in found.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    "table",
    [{"lr": 1.5}, {"lr": "0.5"}, {"lr": True}, {"width": 2.5}, {"width": 9}, {"rule": "lion"}, {"other": 1}, {}, 3],
)
def test_a_point_outside_of_the_space_is_refused(table: object) -> None:
    own = space("lr=interval(0,1)", "width=int(interval(1,8))", "rule=sgd,adam")
    with pytest.raises(ValueError, match="`hydra.sweeper.starts`"):
        own.start(table)
