"""Vector instructions of the processor: the widest are tried, and the others are then not."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from hypertorch.hypergradients.reverse_mode.compiled import vector_instructions

ALL = ["new newest", "new", "old"]


class Choice:
    """A set of instructions, which PyTorch tries when it is asked for its truth."""

    def __init__(self, name: str, *, compiles: bool) -> None:
        self.name, self.compiles, self.trials = name, compiles, 0

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        self.trials += 1
        return self.compiles


@pytest.mark.parametrize(
    ("machine", "known", "compiles", "seen", "trials"),
    [
        ("x86_64", ["old", "new", "newest"], True, ["new"], [0, 1, 0]),
        ("x86_64", ["old", "new"], True, ["new"], [0, 1, 0]),
        ("x86_64", ["old"], True, ["old"], [0, 0, 1]),
        ("x86_64", ["old", "new"], False, ALL, [0, 1, 0]),
        ("x86_64", [], True, ALL, [0, 0, 0]),
        ("aarch64", ["old", "new"], True, ALL, [0, 0, 0]),
    ],
)
def test_the_widest_are_tried_alone_and_others_find_all_sets(
    monkeypatch: pytest.MonkeyPatch, machine: str, known: list[str], compiles: bool, seen: list[str], trials: list[int]
) -> None:
    choices, looked_at = offered(monkeypatch, machine, known, compiles)
    assert looked_at() == ALL  # by a compilation before
    with vector_instructions.widest_alone():
        assert looked_at() == seen
    assert [choice.trials for choice in choices] == trials
    assert looked_at() == ALL


@pytest.mark.parametrize("way", ["environment", "setting"])
def test_the_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    choices, looked_at = offered(monkeypatch, "x86_64", ["old", "new"], True)
    if way == "environment":
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "old")
    else:
        monkeypatch.setattr(vector_instructions.config.cpp, "simdlen", 256)
    with vector_instructions.widest_alone():
        assert looked_at() == ALL
    assert not any(choice.trials for choice in choices)


def offered(
    monkeypatch: pytest.MonkeyPatch, machine: str, known: list[str], compiles: bool
) -> tuple[list[Choice], Callable[[], list[str]]]:
    """Sets up a processor; returns its choices, and a function that tells which of them PyTorch looks at."""
    choices = [Choice(name, compiles=compiles) for name in ALL]
    instructions: Any = vector_instructions._instructions
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(instructions, "x86_isa_checker", lambda: known)
    monkeypatch.setattr(instructions, "supported_vec_isa_list", choices)
    look = cache(lambda: [str(choice) for choice in instructions.supported_vec_isa_list])
    monkeypatch.setattr(instructions, "valid_vec_isa_list", look)
    return choices, look
