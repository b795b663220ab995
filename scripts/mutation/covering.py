"""Which tests reach which line of the library, and how long each takes: measured once, and kept."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path

import coverage

from scripts.mutation.child import Child, run_all
from scripts.mutation.mutants import PACKAGE, Mutant, digest

_FIRST = 10.0  # seconds of tests in the first batch: what notices nearly every error must not wait for all imports
_SECOND = 60.0
_INTERFACE = "tests/test_interface.py"  # looks at what an import makes: parameters, defaults, classes


class Covering:
    """The tests by line.

    A test file is measured when it is new or has changed. When the library has changed since, its lines are found again
    by their text, and a new line counts as reached where the line before it is.

    Args:
        folder: where measurements are kept, one of each test file.
        root: the checkout.
        files: the files of the checkout.
        most: seconds of tests to run for one mutant, the slowest left out.
    """

    def __init__(self, folder: Path, root: Path, files: list[str], *, most: float) -> None:
        self._root, self._most = root, most
        self._state = digest(root, [name for name in files if name.startswith(f"{PACKAGE}/")])
        self._sources = folder / "sources"
        self._measured = folder / "tests"
        tests = [name for name in files if name.startswith("tests/") and Path(name).name.startswith("test_")]
        self._stems = {name: digest(root, [name]) for name in tests}
        self.seconds: dict[str, float] = {}
        self._lines: dict[str, dict[int, set[str]]] = {}

    def measure(self, copies: list[Path], log: Callable[[str], Path], said: Callable[[str], None]) -> None:
        """Runs every test file that was not measured, each in its own process."""
        missing = [name for name in self._stems if not self._is_measured(name)]
        # Those of everything at once last: they take the longest.
        folders = ("tests/benchmarks/", "tests/conformance/", "tests/databases/", "tests/experiments/")
        missing.sort(key=lambda name: (name.startswith(folders), name.count("/")))
        if not missing:
            return
        self._measured.mkdir(parents=True, exist_ok=True)
        if not (self._sources / self._state).exists():
            shutil.copytree(self._root / PACKAGE, self._sources / self._state / PACKAGE)
        free = list(copies)

        def children() -> Iterator[tuple[tuple[str, Path], Child]]:
            for name in missing:
                data = self._file(name, "coverage")
                data.unlink(missing_ok=True)
                copy = free.pop()
                yield (name, copy), Child(copy, [[name]], expected={}, log=log(name), data=data, first_only=False)

        for number, ((name, copy), outcome) in enumerate(run_all(children(), len(copies))):
            free.append(copy)
            if not outcome.seconds and outcome.failed:
                sys.exit(f"No test of {name} passes: {outcome.why}, see {log(name)}. Mend the tests first.")
            found = {"state": self._state, "seconds": outcome.seconds}
            self._file(name, "json").write_text(json.dumps(found))
            failed = f", {outcome.why}: {outcome.failed}" if outcome.failed else ""
            said(f"{number + 1}/{len(missing)} {name}: {len(outcome.seconds)} tests, {outcome.wall:.0f} s{failed}")

    def unmeasured(self) -> list[str]:
        """Returns the test files of which it is not known what they reach."""
        return [f"`{name}`" for name in self._stems if not self._is_measured(name)]

    def load(self) -> None:
        """Reads how long each test takes."""
        for name in filter(self._is_measured, self._stems):
            self.seconds.update(self._found(name)["seconds"])

    def batches(self, mutant: Mutant) -> list[list[str]]:
        """Returns the tests that reach a mutant, the nearest and the fastest first, in batches.

        What runs when the module is imported is under no test: there all tests that reach any line of the module count,
        with those of its folder and of the interface.
        """
        near = _near(mutant.path)
        folder = f"{Path(near).parent}/"
        # One test may import a module for the first time, and then reaches its lines as no other does.
        reached = set() if mutant.at_import else self._reaching(mutant)
        if not reached:
            some = set().union(*self._of(mutant.path).values())
            reached = some | {name for name in self.seconds if name.startswith((_INTERFACE, folder))}
        # The tests of the interface look at classes and defaults, in no time.
        first = (_INTERFACE, near) if mutant.at_import else near
        ordered = sorted(
            reached, key=lambda name: (not name.startswith(first) or self.seconds[name] > 2, self.seconds[name])
        )
        # Of a test file that was not measured, all tests may reach it.
        whole = [_INTERFACE, near] if mutant.at_import else [near]
        found: list[list[str]] = [[n for n in whole if n in self._stems and not self._is_measured(n)], [], []]
        total = 0.0
        for name in ordered:
            total += self.seconds[name] + 0.02
            if total > self._most and any(found):
                break
            found[0 if total < _FIRST else 1 if total < _SECOND else 2].append(name)
        return [batch for batch in found if batch]

    def reaches(self, mutant: Mutant) -> int:
        """Returns how many tests reach the line of a mutant."""
        return len(self._reaching(mutant))

    def _reaching(self, mutant: Mutant) -> set[str]:
        lines = self._of(mutant.path)
        return set().union(*(lines.get(line, set()) for line in range(mutant.first_line, mutant.last_line + 1)))

    def _of(self, path: str) -> dict[int, set[str]]:
        """Returns the tests that reach each line of a file of the library."""
        if path not in self._lines:
            found: dict[int, set[str]] = {}
            moves: dict[str, dict[int, list[int]]] = {}
            for test, stem in self._stems.items():
                if not self._is_measured(test):
                    continue
                data = coverage.CoverageData(str(self._measured / f"{stem}.coverage"))
                data.read()
                state = self._found(test)["state"]
                for file in data.measured_files():
                    if not file.endswith(path):
                        continue
                    if state not in moves:
                        moves[state] = moved_lines(self._sources / state / path, self._root / path)
                    for line, names in data.contexts_by_lineno(file).items():
                        known = {name for name in names if name in self.seconds}
                        for now in moves[state].get(line, []):
                            found.setdefault(now, set()).update(known)
            self._lines[path] = found
        return self._lines[path]

    def _is_measured(self, test: str) -> bool:
        return self._file(test, "json").exists()

    def _file(self, test: str, kind: str) -> Path:
        return self._measured / f"{self._stems[test]}.{kind}"

    def _found(self, test: str) -> dict:
        return json.loads(self._file(test, "json").read_text())


def moved_lines(before: Path, now: Path) -> dict[int, list[int]]:
    """Returns where each line of a file is now, new lines with the line before them; counted from 1."""
    if not before.exists():
        return {}
    old, new = before.read_text().splitlines(), now.read_text().splitlines()
    places: dict[int, list[int]] = {}
    last = 0
    known = {
        block.b + offset: block.a + offset
        for block in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
        for offset in range(block.size)
    }
    for line in range(len(new)):
        last = known.get(line, last)
        places.setdefault(last + 1, []).append(line + 1)
    return places


def _near(path: str) -> str:
    """Returns the test file of a file's own name."""
    folder, name = Path(path).relative_to(PACKAGE).parent, Path(path).stem
    return str(Path("tests") / folder / f"test_{name}.py")
