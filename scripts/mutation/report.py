"""What came of a run, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.mutation.mutants import Mutant

Done = dict[tuple[str, ...], dict[str, Any]]
_COLUMNS = ("noticed", "survived", "equivalent", "unsound")
_START, _END = "<!-- figures: written by scripts/mutate --page -->", "<!-- end of figures -->"


def survivors(drawn: list[Mutant], done: Done) -> str:
    """Returns the mutants that no test noticed, with their places."""
    lines: list[str] = []
    for mutant in drawn:
        line = done.get(mutant.key)
        if line is not None and line["outcome"] in ("survived", "unsound"):
            lines += [
                "",
                f"{line['outcome']}: {mutant.place} {mutant.function} ({line['tests']} tests run, the line is "
                f"reached by {line['reached_by']}) {line['why']}",
                mutant.diff(),
            ]
    return "\n".join(lines)


def table(drawn: list[Mutant], done: Done) -> str:
    """Returns how many came to what, by folder, as a table in Markdown."""
    folders = sorted({mutant.folder for mutant in drawn})
    rows = []
    for folder in [*folders, "all"]:
        came_to = [
            done[mutant.key]["outcome"] for mutant in drawn if mutant.key in done and folder in (mutant.folder, "all")
        ]
        rows.append([folder, str(len(came_to)), *(str(came_to.count(column)) for column in _COLUMNS)])
    head = ["folder", "drawn", *_COLUMNS]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(page: Path, drawn: list[Mutant], done: Done, *, seed: int, file: Path) -> None:
    """Writes the figures of a run and the list of equivalents between the marks of a page."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(file))
    text = page.read_text()
    start, end = text.index(_START) + len(_START), text.index(_END)
    lines = [f"Seed {seed}, {len(drawn)} mutants:", "", table(drawn, done), "", "Equivalent, by hand:", ""]
    for entry in entries:
        where = f"{entry['file']}, {entry['function'] or 'module'}"
        lines.append(f"- `{where}`: `{entry['old'].strip()}` becomes `{entry['new'].strip()}`: {entry['why']}")
    page.write_text(text[:start] + "\n\n" + "\n".join(lines) + "\n\n" + text[end:])
