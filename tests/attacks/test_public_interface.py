"""Hostile values, drawn for every argument of everything public: taken, or refused by the argument's name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hypertorch as ht
from hypertorch import dynamics, fewshot, hypergradients, linear_solvers, search
from hypertorch.errors import HypertorchError
from tests.attacks.attack import fault_of_message, is_own
from tests.attacks.public_calls import CALLS
from tests.attacks.public_interface import ELSEWHERE, TUPLES, Stranger

# Numbers that ask for as much work or memory as they say are no malformed input: small ones are drawn.
NUMBERS = st.one_of(st.integers(-3, 3), st.floats(), st.booleans(), st.complex_numbers(), st.just(-(2**70)))
ODD = st.one_of(
    NUMBERS,
    st.text(max_size=3),
    st.binary(max_size=3),
    st.none(),
    st.builds(Stranger),
    st.lists(NUMBERS, max_size=2),
    st.dictionaries(st.text(max_size=2), NUMBERS, max_size=2),
    st.sampled_from([torch.tensor(math.nan), torch.empty(0), torch.ones(2, dtype=torch.bool), object, len, ...]),
)
MODULES = (ht, dynamics, fewshot, hypergradients, linear_solvers, search)
# These look for files, or take a command of Hydra; the other tables have them.
WITH_FILES = {"ImageFolder", "CIFARFS", "MiniImageNet", "Omniglot", "load_hparams", "save_hparams", "searchable"}
# The library makes these itself, or they are parts for those who extend it.
PARTS = {
    *("PruningLogger", "Checkpoint", "FailedTrial", "Bracket", "GPParameters", "GradientGP", "Observations", "Range"),
    *("fit_gradient_gp", "resolve", "setting"),
    "join_ranks",  # a context, which looks at its arguments when it is entered
}


def is_for_users(value: Any) -> bool:
    if not inspect.isclass(value):
        return inspect.isfunction(value)
    return not inspect.isabstract(value) and not issubclass(value, Exception)


DRAWN_FOR = [call for call in CALLS if call.__name__ not in WITH_FILES and call not in TUPLES]


@pytest.mark.parametrize("call", DRAWN_FOR, ids=lambda call: call.__name__)
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_hostile_values_are_taken_or_named(call: Callable[..., Any], data: st.DataObject) -> None:
    names = [name for name in inspect.signature(call).parameters if (call, name) not in ELSEWHERE]
    name = data.draw(st.sampled_from(names))
    value = data.draw(ODD)
    refusal = None
    try:
        call(**{**CALLS[call], name: value})
    except (HypertorchError, TypeError, ValueError) as error:
        refusal = error
    if refusal is not None:
        assert is_own(refusal), f"{name}={value!r}: {refusal!r}"
        assert fault_of_message(str(refusal), "`|loss holds") is None, f"{name}={value!r}: {refusal}"


def test_everything_public_that_takes_arguments_is_called() -> None:
    """What is not in the table is a result, an abstract class, or named above."""
    missing = set()
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            takes = is_for_users(value) and value not in CALLS and name not in WITH_FILES | PARTS
            if takes and getattr(value, "__doc__", "") and "Args:" in value.__doc__:
                missing.add(name)
    assert not missing
