"""Names of `hypertorch.search` are imported when they are asked for; without their package, one message says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hypertorch import search

BLOCKED = """
import sys
sys.modules["botorch"] = sys.modules["optuna"] = None
import hypertorch as ht
assert "gpytorch" not in sys.modules
ht.search.Matern52()
for name in ("minimise", "GradientBayes", "GradientSampler"):
    try:
        getattr(ht.search, name)
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize("name", search.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(search, name).__name__ == name
    assert name in dir(search)


def test_names_that_are_none_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'maximise'"):
        _ = search.maximise


def test_a_missing_package_is_one_message() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line, name, package, extra in zip(
        lines,
        ("minimise", "GradientBayes", "GradientSampler"),
        ("botorch", "botorch", "optuna"),
        ("gp", "gp", "gp,search"),
        strict=True,
    ):
        assert f"`ht.search.{name}` needs {package}" in line
        assert f"pip install 'hypertorch[{extra}]'" in line


def test_a_bug_in_a_module_of_its_own_is_not_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> object:
        raise ModuleNotFoundError(name="hypertorch.nonsense")

    monkeypatch.setattr(search, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError):
        _ = search.PruningLogger
