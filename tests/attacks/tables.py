"""All malformed inputs."""

from __future__ import annotations

from collections.abc import Iterator

from tests.attacks import images
from tests.attacks.attack import Attack


def all_attacks() -> Iterator[Attack]:
    """Yields every attack, kind by kind."""
    yield from images.attacks()
