"""Without the optional packages the library is imported, and says what a name of the search needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hypertorch as ht

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


def test_names_that_are_none_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'maximise'"):
        _ = ht.search.maximise
