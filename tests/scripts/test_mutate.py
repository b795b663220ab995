"""`scripts/mutate`: what is changed and what is left alone, and that nothing of it stays."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from cosmic_ray.mutating import mutate_code

from scripts.mutation.__main__ import FOLDERS
from scripts.mutation.copies import changed
from scripts.mutation.covering import moved_lines
from scripts.mutation.mutants import PACKAGE, Mutant, draw, equivalents, make, places
from scripts.mutation.operators import OWN

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENTS = ROOT / "scripts" / "mutation" / "equivalents.yaml"

SOURCE = '''"""A docstring with 1 + 1."""
from __future__ import annotations
import warnings
__all__ = ["f", "g"]
Pair: TypeAlias = tuple[int, int] | None

def f(value: int | None, *, other: dict[str, int] = {"a": 1}) -> int | None:
    """Adds 1 + 1."""
    if value is None:
        raise ValueError(f"`value` is {value + 1}: " "too small")
    warnings.warn(f"{value + 2} is odd")
    key = (value, other)
    return key
'''


def mutants(root: Path, source: str) -> list[Mutant]:
    """Returns the mutants of a package of one file."""
    (root / PACKAGE).mkdir(exist_ok=True)
    (root / PACKAGE / "one.py").write_text(source)
    made = (make(root, f"{PACKAGE}/one.py", *place) for place in places(source))
    return [found[0] for found in made if found is not None]


@pytest.mark.parametrize(
    ("operator", "example"), [(kind, example) for kind in OWN for example in kind.examples()], ids=str
)
def test_operators_do_what_their_examples_say(operator, example) -> None:
    made = mutate_code(example.pre_mutation_code, operator(**example.operator_args), example.occurrence)
    assert made == example.post_mutation_code


def test_only_what_has_an_effect_is_changed(tmp_path: Path) -> None:
    found = {(mutant.old, mutant.new.replace("  ", " ")) for mutant in mutants(tmp_path, SOURCE)}
    head = 'def f(value: int | None, *, other: dict[str, int] = {"a": 1}) -> int | None:'
    assert found == {
        (head, head.replace("1", "2")),
        (head, head.replace("1", "0")),
        ("if value is None:", "if value is not None:"),
        ("if value is None:", "if not value is None:"),
        ('warnings.warn(f"{value + 2} is odd")', "pass"),
        ("key = (value, other)", "key = ( other,)"),
        ("key = (value, other)", "key = (value,)"),
    }


def test_the_parts_of_keys_and_the_arguments_with_defaults_are_left_out(tmp_path: Path) -> None:
    source = "def f(a, b):\n    x, y = a, b\n    for p, q in a:\n        g(p, every=q)\n    return {**a, 'b': b}\n"
    found = {mutant.new for mutant in mutants(tmp_path, source)}
    # Pairs that are unpacked are whole: one element less is noticed by any test.
    assert found == {"g(p)", "pass", "for p, q in []:", "return { 'b': b}", "return {**a}"}


def test_a_draw_is_the_seeds_own() -> None:
    first, again, other = (draw(ROOT, ["linear_solvers"], seed=seed, count=8) for seed in (0, 0, 1))
    assert first == again != other
    assert {mutant.folder for mutant in first} == {"linear_solvers"}
    for mutant in first:
        lines = (ROOT / mutant.path).read_text().splitlines()
        assert lines[mutant.first_line - 1 : mutant.last_line], mutant
        assert mutant.code((ROOT / mutant.path).read_text()) != (ROOT / mutant.path).read_text()


def test_a_draw_stays_when_other_lines_change(tmp_path: Path) -> None:
    source = "def f(a):\n    b = a + 1\n    return b * 2\n\ndef g(a):\n    b = a + 1\n    return b < 3\n"

    def drawn(text: str) -> list[tuple[str, ...]]:
        mutants(tmp_path, text)
        return [mutant.key for mutant in draw(tmp_path, ["core"], seed=3, count=100)]

    before, now = drawn(source), drawn("x = 5\n\n" + source.replace("return b < 3", "return b < 4"))
    kept = [key for key in before if "b < 3" not in key[2]]
    assert kept and [key for key in now if key in kept] == kept


def test_every_folder_is_drawn_from() -> None:
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert folders == set(FOLDERS) - {"core"}


def test_a_changed_file_is_as_it_was_also_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text("a = 1\n")
    before = file.stat().st_mtime_ns
    times = set()
    for _ in range(2):
        with suppress(KeyError), changed(file, "a = 2\n"):
            assert file.read_text() == "a = 2\n"
            times.add(int(file.stat().st_mtime))
            raise KeyError
        assert file.read_text() == "a = 1\n"
        assert file.stat().st_mtime_ns == before
    # Else Python would take the compiled code of one for that of the other: it looks at seconds and size.
    assert len(times | {before // 10**9}) == 3


def test_lines_are_found_again_by_their_text(tmp_path: Path) -> None:
    before, now = tmp_path / "before.py", tmp_path / "now.py"
    before.write_text("a\nb\nc\n")
    now.write_text("new\na\nb\nbetween\nc\n")
    assert moved_lines(before, now) == {1: [1, 2], 2: [3, 4], 3: [5]}


def test_equivalents_are_still_in_the_code() -> None:
    known = equivalents(EQUIVALENTS)
    for (path, function, old, new), why in known.items():
        source = [line.strip() for line in (ROOT / path).read_text().splitlines()]
        where = f"{path}, {function}: {old}"
        assert all(line in source for line in old.splitlines()), where
        assert new != old and why.strip(), where


def test_what_runs_at_import_is_told_from_what_runs_in_a_function(tmp_path: Path) -> None:
    at_import = {mutant.old: mutant.at_import for mutant in mutants(tmp_path, SOURCE)}
    assert {line for line, value in at_import.items() if value} == {
        'def f(value: int | None, *, other: dict[str, int] = {"a": 1}) -> int | None:'
    }
    assert not at_import["if value is None:"] and not at_import["key = (value, other)"]
