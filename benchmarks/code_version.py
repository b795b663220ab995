"""Which code the figures were measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def commit(root: Path = _ROOT) -> str | None:
    """Returns the short hash of the commit that is checked out, with "+" behind it if tracked files differ from it.

    Args:
        root: of the checkout; by default this one, whose files every process of the benchmark runs.

    Returns:
        None if it is no git checkout, or there is no git.
    """
    # A folder without it may lie in a checkout of something else.
    if not (root / ".git").exists():
        return None
    describe = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
