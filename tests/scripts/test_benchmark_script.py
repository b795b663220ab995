"""`scripts/benchmark` and the environment's extras, with the installing left out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/environment.sh", "scripts/constraints.txt", "scripts/benchmark", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    return tmp_path


def bash(code: str) -> list[str]:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def prepared(checkout: Path, *extras: str) -> list[str]:
    """Returns what would be installed."""
    return bash(
        f'. "{checkout}/scripts/environment.sh"; install() {{ printf "%s\\n" "${{@: -1}}"; }}; '
        f"usable_python() {{ true; }}; prepare_environment {' '.join(extras)}"
    )


def test_an_extra_is_installed_once_and_is_no_part_of_the_rest(checkout: Path) -> None:
    assert prepared(checkout)[-1] == f"{checkout}[dev]"
    assert prepared(checkout, "benchmark")[-1] == f"{checkout}[dev,benchmark]"
    assert prepared(checkout, "benchmark") == []
    assert prepared(checkout) == []


def test_an_environment_made_anew_has_no_extra(checkout: Path) -> None:
    prepared(checkout, "benchmark")
    with (checkout / "scripts" / "constraints.txt").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert prepared(checkout)[-1] == f"{checkout}[dev]"
    assert prepared(checkout, "benchmark")[-1] == f"{checkout}[dev,benchmark]"


def test_cuda_is_short_for_the_device(checkout: Path) -> None:
    (checkout / "scripts" / "environment.sh").write_text(
        'root=here\nvenv="$(mktemp -d)"\nmkdir "$venv/bin"\nprepare_environment() { echo "extra $*"; }\n'
        'printf \'#!/bin/sh\\nprintf "%%s\\\\n" "$@"\\n\' >"$venv/bin/python"\nchmod +x "$venv/bin/python"\n',
        encoding="utf-8",
    )
    script = checkout / "scripts" / "benchmark"
    expected = ["extra benchmark", "here/benchmarks/compare_libraries.py"]
    assert bash(f'"{script}"') == expected
    assert bash(f'"{script}" --cuda "only=[a b]"') == [*expected, "device=cuda", "only=[a b]"]


def test_every_peer_is_pinned() -> None:
    pinned = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for name in ("higher", "torchopt", "optree", "graphviz", "psutil", "jax", "jaxlib", "ml-dtypes", "opt-einsum"):
        assert any(line.startswith(f"{name}==") for line in pinned), name
