"""Every malformed input is refused: by one typed error in three parts, at once, with no code of a stranger run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.attack import Attack, judge
from tests.attacks.tables import all_attacks


@pytest.mark.parametrize("attack", list(all_attacks()), ids=lambda attack: f"{attack.kind}: {attack.name}")
def test_a_malformed_input_is_refused(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERTORCH_DATA", raising=False)
    assert judge(attack, tmp_path).fault is None
