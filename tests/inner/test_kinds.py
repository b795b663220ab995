"""What makes two problems one kind: how deep and how far attributes are looked into."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import hypertorch as ht
from hypertorch.inner.kinds import kind_of
from tests.helpers.problems import LambdaOuter, NetInner


def holding(value: object) -> ht.BilevelProblem:
    """A problem with one more attribute."""
    inner = NetInner()
    inner.held = value  # type: ignore[attr-defined]
    return ht.BilevelProblem(inner, OUTER, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=2)


OUTER = LambdaOuter({}, lambda params, hparams, batch: params["first"].sum())


class Holder:
    held: Any = None

    def method(self) -> None: ...


def through_itself(wrap: Callable[[Any], object]) -> object:
    """An object that leads back to itself."""
    holder = Holder()
    holder.held = wrap(holder)
    return holder.held


def closed_over(value: object) -> Callable[[], object]:
    return lambda: value


class Wrapping(ht.dynamics.SGD):
    pass


def dynamics_around(value: object) -> ht.Dynamics:
    rule = Wrapping(lr=0.1)
    object.__setattr__(rule, "lr", value)
    return rule


def module_around(value: object) -> nn.Module:
    module = nn.Linear(1, 1)
    module.held = value
    return module


def tagged(word: str) -> torch.Tensor:
    """A tensor with an attribute."""
    tensor = torch.zeros(())
    tensor.word = word  # type: ignore[attr-defined]
    return tensor


def called(value: object, *, by_name: object = None) -> None: ...


CIRCLES: dict[str, Callable[[Any], object]] = {
    "object": lambda holder: holder,
    "method": lambda holder: holder.method,
    "method of a partial": lambda holder: MethodType(partial(called, holder), holder),
    "partial": lambda holder: partial(called, holder),
    "partial by name": lambda holder: partial(called, by_name=holder),
    "closure": closed_over,
    "dict": lambda holder: {"a": holder},
    "tuple": lambda holder: (holder,),
    "list": lambda holder: [holder],
    "module": module_around,
    "functional module": lambda holder: ht.FunctionalModule(module_around(holder)),
    "dynamics": dynamics_around,
}


@pytest.mark.parametrize("how", CIRCLES)
def test_objects_that_refer_to_each_other_are_looked_into_so_far_and_no_farther(how: str) -> None:
    first, again = (kind_of(holding(through_itself(CIRCLES[how]))) for _ in range(2))
    assert hash(first) == hash(again) and first == again


@pytest.mark.parametrize("make", [tuple, list, lambda words: dict.fromkeys(words, 0)], ids=["tuple", "list", "dict"])
def test_a_long_container_holds_data_and_a_short_one_choices(make: Callable[[list[str]], object]) -> None:
    def differ(length: int) -> bool:
        words = [str(position) for position in range(length)]
        return kind_of(holding(make(words))) != kind_of(holding(make([*words[:-1], "another"])))

    assert differ(32) and not differ(33)


def defaulting(value: int) -> Callable[[], int]:
    return lambda held=value: held


def defaulting_by_name(value: int) -> Callable[[], int]:
    return lambda *, held=value: held


@pytest.mark.parametrize(
    "pair",
    [
        (partial(called, 1), partial(called, 2)),
        (partial(called, by_name=1), partial(called, by_name=2)),
        (partial(called, 1), partial(closed_over, 1)),
        (torch.sin, torch.cos),
        (math.sin, cmath.sin),
        ([].append, set().add),
        (torch.nn, torch.linalg),
        ("a", "b"),
        (torch.float32, torch.float64),
        (1, True),
        (1, 1.0),
        (torch.zeros(()), torch.Tensor),
        (torch.zeros(()), tagged("a")),
        (tagged("a"), tagged("b")),
        (module_around(1), module_around(True)),
        (module_around(1), module_around(1.0)),
        (module_around(1), module_around(2)),
        (module_around(torch.zeros(())), module_around(torch.Tensor)),
        (nn.ReLU(), nn.Tanh()),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.Dropout().train(), nn.Dropout().eval()),
        ((1, 2), [1, 2]),
        (["a"], ["b"]),
        (defaulting(1), defaulting(2)),
        (defaulting_by_name(1), defaulting_by_name(2)),
    ],
)
def test_what_chooses_other_operations_is_of_another_kind(pair: tuple[object, object]) -> None:
    left, right = (kind_of(holding(value)) for value in pair)
    assert left != right
    assert kind_of(holding(pair[0])) == left


def test_the_context_and_the_rule_are_of_the_kind() -> None:
    problem = holding(None)
    others = [
        replace(problem, context=lambda hparams, batch: {}),
        replace(problem, context=lambda hparams, batch: {"a": torch.zeros(())}),
        replace(problem, dynamics=ht.dynamics.SGD(lr=0.2)),
        replace(problem, outer=LambdaOuter({}, lambda params, hparams, batch: params["second"].sum())),
    ]
    assert len({kind_of(each) for each in (problem, *others)}) == 5


def test_a_function_that_calls_itself_is_looked_into_while_it_is_made() -> None:
    def outer() -> object:
        kinds = [kind_of(holding(lambda: later))]
        later = 1
        return kinds[0]

    assert outer() is not None


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_traced_module_has_the_kinds_of_its_parts() -> None:
    """It keeps its parts elsewhere than a plain module does."""
    nets = [nn.Sequential(nn.Linear(2, 2), activation) for activation in (nn.Tanh(), nn.LeakyReLU(0.1), nn.Tanh())]
    tanh, leaky, again = (kind_of(holding(torch.jit.trace(net, torch.zeros(1, 2)))) for net in nets)
    assert tanh == again != leaky
