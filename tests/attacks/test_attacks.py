"""Every malformed input is refused: by one typed error in three parts, at once, with no code of a stranger run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.attack import judge
from tests.attacks.tables import SLOW, by_kind

KINDS = by_kind()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]
)
def test_malformed_inputs_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERTORCH_DATA", raising=False)
    faults = {}
    for number, attack in enumerate(KINDS[kind]):
        folder = tmp_path / str(number)
        folder.mkdir()
        fault = judge(attack, folder).fault
        if fault is not None:
            faults[attack.name] = fault
    assert not faults


def test_there_are_as_many_inputs_as_the_page_says() -> None:
    assert sum(map(len, KINDS.values())) >= 400
