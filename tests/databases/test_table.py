"""The command that writes the page: it goes on where it was killed, and folds what is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.databases import table
from tests.databases.page import advice_of, page, worst
from tests.databases.verdicts import WAYS, Verdict

RIGHT = Verdict("right", error=1e-9)
REFUSED = Verdict(
    "refused", "the inner problem uses `x`, which has none: no tangent. Write it out, or use `Reverse()`."
)


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> list[str]:
    """Runs the command and returns the samples that it judged."""
    judged: list[str] = []
    arguments = ["table", "--results", str(folder / "results.jsonl"), "--page", str(folder / "page.md"), *words]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(table, "OPERATIONS", dict.fromkeys(("sin", "nn.functional.relu")))
    monkeypatch.setattr(table, "MODULES", {})
    monkeypatch.setattr(table, "judge", lambda sample: judged.append(sample.name) or dict.fromkeys(WAYS, RIGHT))
    table.main()
    return judged


def test_a_killed_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path)[0] == "operators/sin/0"
    results = tmp_path / "results.jsonl"
    _, first, second = results.read_text().splitlines()
    results.write_text(f"{first}\n{second[: len(second) // 2]}")
    assert {name.rpartition("/")[0] for name in run(monkeypatch, tmp_path)} == {"operators/nn.functional.relu"}
    assert run(monkeypatch, tmp_path) == []
    assert {name.rpartition("/")[0] for name in run(monkeypatch, tmp_path, "--again", "operators/sin")} == {
        "operators/sin"
    }
    assert "2 are right by every backend" in (tmp_path / "page.md").read_text()


def test_results_of_other_versions_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, tmp_path)
    results = tmp_path / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().split("\n") if line]
    lines[0]["versions"]["PyTorch"] = "1.0"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page(table._known(results), {"PyTorch": "2.0"}, ["operators/y"])
    assert "1 names" in text and "**Not run: `operators/y`.**" in text


def test_the_page_shows_the_worst_and_gathers_advice() -> None:
    verdicts = {**dict.fromkeys(WAYS, RIGHT), "Forward()": REFUSED}
    text = page({"operators/x": {"operators/x/0": verdicts, "operators/x/1": dict.fromkeys(WAYS, RIGHT)}}, {})
    assert "| `x` | right | right | right | refused |" in text
    assert "- **Write it out, or use `Reverse()`.** (`Forward()`)\n  `x`" in text


def test_advice_behind_a_quotation_is_found() -> None:
    message = "it cannot be vectorised. PyTorch says: Feel free to file an issue! Push one at a time with `Forward()`."
    assert advice_of(message) == "Push one at a time with `Forward()`."


def test_words() -> None:
    assert worst([RIGHT, REFUSED, Verdict("wrong")]) == "wrong"
    assert advice_of(REFUSED.text) == "Write it out, or use `Reverse()`."
