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
    ("machine", "known", "compiles", "taken", "trials"),
    [
        ("x86_64", ["old", "new", "newest"], True, ["new"], [0, 1, 0]),
        ("x86_64", ["old", "new"], True, ["new"], [0, 1, 0]),
        ("x86_64", ["old"], True, ["old"], [0, 0, 1]),
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
    taken: list[str] | None,
    trials: list[int],
) -> None:
    choices, looked_at = offered(monkeypatch, machine, known, compiles)
    vector_instructions.choose()
    assert [choice.trials for choice in choices] == trials
    assert looked_at == ([] if taken is None else [taken])
    assert vector_instructions._instructions.supported_vec_isa_list is choices


def test_the_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    choices, looked_at = offered(monkeypatch, "x86_64", ["old", "new"], True)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "old")
    vector_instructions.choose()
    assert not looked_at
    assert not any(choice.trials for choice in choices)


def offered(
    monkeypatch: pytest.MonkeyPatch, machine: str, known: list[str], compiles: bool
) -> tuple[list[Choice], list[list[str]]]:
    """Sets up a processor; returns its choices, and a list of those that PyTorch looks at in each call."""
    choices = [Choice(name, compiles=compiles) for name in ("new newest", "new", "old")]
    looked_at: list[list[str]] = []
    instructions: Any = vector_instructions._instructions
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(instructions, "x86_isa_checker", lambda: known)
    monkeypatch.setattr(instructions, "supported_vec_isa_list", choices)
    look = lambda: looked_at.append([str(choice) for choice in instructions.supported_vec_isa_list])  # noqa: E731
    monkeypatch.setattr(instructions, "valid_vec_isa_list", look)
    return choices, looked_at
