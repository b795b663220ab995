"""Words of a command line that are read as counts, bytes and folders, or refused by the name of their option."""

from __future__ import annotations

import argparse
from pathlib import Path

from hypertorch.autodiff.live_memory import parse_bytes


def count(word: str) -> int:
    """Returns a whole number of at least 1."""
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number of at least 1")
    return int(word)


def size(word: str) -> int:
    """Returns a number of bytes, written as `parse_bytes` takes it."""
    try:
        return parse_bytes(word, "size")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def folder(word: str) -> Path:
    """Returns a folder that there is."""
    if not word or not Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"{word!r} is no folder")
    return Path(word)
