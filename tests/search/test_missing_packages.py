"""Without the optional packages the library is imported, and says what a name of the search needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hypertorch as ht

BLOCKED = """
import sys
sys.modules[{package!r}] = None
import hypertorch as ht
assert "botorch" not in sys.modules or sys.modules["botorch"] is None
ht.search.Matern52()
try:
    ht.search.{name}
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [("botorch", "minimise", "gp"), ("botorch", "GradientBayes", "gp"), ("optuna", "GradientSampler", "gp,search")],
)
def test_a_missing_package_is_one_message(package: str, name: str, extra: str) -> None:
    script = BLOCKED.format(package=package, name=name)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"`ht.search.{name}` needs {package}" in done.stdout
    assert f"pip install 'hypertorch[{extra}]'" in done.stdout


def test_names_that_are_none_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'maximise'"):
        _ = ht.search.maximise
