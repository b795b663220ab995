"""Where tests find real data sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def real_data(name: str) -> Path:
    """Returns the folder of a real data set, or skips the test where there is none."""
    given = os.environ.get("HYPERTORCH_TEST_DATA") or os.environ.get("HYPERTORCH_DATA")
    folder = (Path(given).expanduser() if given else _BESIDE_THE_CHECKOUT) / name
    if not folder.is_dir():
        pytest.skip(f"real data {name!r} is not at {str(folder)!r}; set HYPERTORCH_DATA to the folder that has it")
    return folder
