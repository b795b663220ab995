"""The pages of the documentation, with the code, commands, links and headings in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    str(path.relative_to(ROOT))
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:hypertorch|configs|experiments|benchmarks|scripts|tests|docs)/[\w./]*)`")
_HEADING = re.compile(r"^#+ (.*)$", flags=re.MULTILINE)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Returns the fenced blocks of a language, each with the number of its first line."""
    whole = text(page)
    return [
        (whole.count("\n", 0, block.start(2)) + 1, block.group(2))
        for block in _BLOCK.finditer(whole)
        if block.group(1) == language
    ]


def commands(page: str) -> list[list[str]]:
    """Returns the words of every command line in a page's shell blocks."""
    lines = [line for _, block in blocks(page, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def links(page: str) -> list[str]:
    """Returns where a page links to within the repository, as it is written there."""
    prose = _BLOCK.sub("", text(page))
    return [target for target in _LINK.findall(prose) if "://" not in target]


def paths(page: str) -> set[str]:
    """Returns the files and folders of the repository that a page's text names."""
    return set(_PATH.findall(_BLOCK.sub("", text(page))))


def anchors(page: str) -> set[str]:
    """Returns the names by which a link reaches a heading of a page, as GitHub makes them."""
    headings = _HEADING.findall(_BLOCK.sub("", text(page)))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: str) -> list[list[str]]:
    """Returns the cells of every line of a page's tables, headings among them."""
    lines = [line.strip() for line in text(page).splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
