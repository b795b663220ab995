"""Vector instructions of the processor: the first choice is tried, and the others are then not."""

from __future__ import annotations

import platform
from typing import Any

import pytest

from hypertorch.hypergradients.reverse_mode.compiled import vector_instructions


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
    ("machine", "known", "compiles", "found", "trials"),
    [
        ("x86_64", ["old", "new"], True, True, [0, 1, 0]),
        ("x86_64", ["old"], True, True, [0, 0, 1]),
        ("x86_64", ["old", "new"], False, None, [0, 1, 0]),
        ("x86_64", [], True, None, [0, 0, 0]),
        ("aarch64", ["old", "new"], True, None, [0, 0, 0]),
    ],
)
def test_the_first_choice_alone_is_tried(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    known: list[str],
    compiles: bool,
    found: bool | None,
    trials: list[int],
) -> None:
    choices = [Choice(name, compiles=compiles) for name in ("newest new", "new", "old")]
    instructions: Any = vector_instructions._instructions
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(instructions, "x86_isa_checker", lambda: known)
    monkeypatch.setattr(instructions, "supported_vec_isa_list", choices)
    assert vector_instructions.are_tried() is found
    assert [choice.trials for choice in choices] == trials
