"""Pages of results: what a command writes stands between two marks, and what people write around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.common.commands.failures import ExpectedFailure

_END = "<!-- end of figures -->"


def write_figures(page: Path, command: str, lines: Sequence[str]) -> None:
    """Writes lines into a page, between its marks; what stands outside of them stays as it is.

    A page that is not there is made.

    Args:
        page: the file.
        command: what writes them, such as `experiments/gallery.py`.
        lines: what is written.

    Raises:
        ExpectedFailure: if the page has no marks.
    """
    start = f"<!-- figures: written by {command} -->"
    page.parent.mkdir(parents=True, exist_ok=True)
    old = page.read_text(encoding="utf-8") if page.exists() else f"# {page.parent.name}\n\n{start}\n{_END}\n"
    if start not in old or _END not in old:
        raise ExpectedFailure(
            f"{str(page)!r} has no lines {start!r} and {_END!r}, so there is no place for its figures. Add both."
        )
    before, after = old.split(start)[0], old.split(_END)[-1]
    page.write_text("\n".join([f"{before}{start}", "", *lines, f"{_END}{after}"]), encoding="utf-8")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table.

    Args:
        headings: of the columns.
        rows: what stands in them.
    """
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
