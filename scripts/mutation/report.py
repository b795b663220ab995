"""What came of a run, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.mutation.mutants import Mutant

Done = dict[tuple[str, ...], dict[str, Any]]
_COLUMNS = ("noticed", "survived", "equivalent", "unsound")
_HEADING, _EQUIVALENTS = "### ", "Equivalent, by hand"
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


def write(page: Path, drawn: list[Mutant], done: Done, *, seed: int, file: Path, limit: str) -> None:
    """Writes the figures of a run and the list of equivalents between the marks of a page, beside those of other seeds.

    Args:
        page: the page.
        drawn: the mutants.
        done: what came of each.
        seed: of the draw.
        file: the list of equivalents.
        limit: what the run was limited to, as a sentence.
    """
    text = page.read_text()
    start, end = text.index(_START) + len(_START), text.index(_END)
    _, *sections = text[start:end].split(_HEADING)
    seeds = {section.partition("\n")[0]: section.partition("\n")[2] for section in sections}
    seeds.pop(_EQUIVALENTS, None)
    lines = [f"{len(done)} of {len(drawn)} mutants drawn were run. {limit}", "", table(drawn, done)]
    left = [line for line in survivors(drawn, done).splitlines() if line]
    if left:
        lines += ["", "```diff", *left, "```"]
    seeds[f"Seed {seed}"] = "\n" + "\n".join(lines) + "\n\n"
    entries: Any = OmegaConf.to_container(OmegaConf.load(file))
    listed = []
    for entry in entries:
        where = f"{entry['file']}, {entry['function'] or 'module'}"
        listed.append(f"- `{where}`: `{entry['old'].strip()}` becomes `{entry['new'].strip()}`: {entry['why']}")
    seeds = {name: seeds[name] for name in sorted(seeds)}
    seeds[_EQUIVALENTS] = "\n" + "\n".join(listed) + "\n\n"
    written = "".join(f"{_HEADING}{name}\n{section}" for name, section in seeds.items())
    page.write_text(text[:start] + "\n\n" + written + text[end:])
