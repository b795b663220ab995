"""All malformed inputs."""

from __future__ import annotations

from tests.attacks import callbacks, command_line, images, public_interface
from tests.attacks.attack import Attack

# Kinds that take more than seconds.
SLOW = frozenset(command_line.SLOW)


def by_kind() -> dict[str, list[Attack]]:
    """Returns every attack, kind by kind."""
    kinds: dict[str, list[Attack]] = {}
    for table in (images, public_interface, callbacks, command_line):
        for attack in table.attacks():
            kinds.setdefault(attack.kind, []).append(attack)
    return kinds
