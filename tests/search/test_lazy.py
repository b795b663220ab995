"""What `hypertorch.search` has is imported when it is asked for, and its absence is one clear message."""

from __future__ import annotations

import pytest

from hypertorch import search


@pytest.mark.parametrize("name", search.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(search, name).__name__ == name
    assert name in dir(search)


def test_a_bug_in_a_module_of_its_own_is_not_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> object:
        raise ModuleNotFoundError(name="hypertorch.nonsense")

    monkeypatch.setattr(search, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError):
        _ = search.PruningLogger
