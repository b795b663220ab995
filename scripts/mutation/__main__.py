"""Draws mutants, runs the tests that reach them, and says which were not noticed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from scripts.mutation import report
from scripts.mutation.child import Child, Outcome, run_all, warm_up
from scripts.mutation.copies import changed, copy_checkout
from scripts.mutation.covering import Covering
from scripts.mutation.mutants import Mutant, digest, draw, equivalents

FOLDERS = (
    *("core", "autodiff", "checks", "diagnostics", "dynamics", "fewshot", "hypergradients", "inner", "linear_solvers"),
    *("nn", "outer", "search"),
)
ROOT = Path(__file__).resolve().parents[2]
_KEPT = ROOT / "outputs" / "mutation"


def main() -> int:
    """Runs the command line, and returns 1 if a mutant survived."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["MUTATED_CHECKOUT"] = str(ROOT)
    # Compiled once for each copy, not in every child.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    started = monotonic()
    with tempfile.TemporaryDirectory(prefix="hypertorch-mutation-") as folder:
        # The checkout as it is now, for all of the run: meanwhile it may be worked on.
        source = copy_checkout(ROOT, Path(folder) / "source")
        copies = [shutil.copytree(source, Path(folder) / str(number)) for number in range(arguments.processes)]
        files = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
        state = digest(source, [name for name in files if name.startswith(("hypertorch/", "tests/"))])
        results = _KEPT / "results" / f"seed-{arguments.seed}" / f"{state}.jsonl"
        results.parent.mkdir(parents=True, exist_ok=True)

        drawn = draw(source, arguments.folders, seed=arguments.seed, count=arguments.count)
        before = _noticed_before(results) if arguments.again else {}
        open_ones = [mutant for mutant in drawn if mutant.key not in before]
        covering = Covering(_KEPT / "covering", source, files, most=arguments.most_seconds)
        warm_up()
        log = _logs(_KEPT / "logs")
        if not arguments.as_measured:
            covering.measure(copies, log, _say)
        covering.load()
        done = _Run(source, open_ones, covering, copies, results, log).run()
        done |= {mutant.key: before[mutant.key] for mutant in drawn if mutant.key in before}
    minutes = (monotonic() - started) / 60
    _say(report.survivors(drawn, done))
    _say(report.table(drawn, done))
    _say(f"{minutes:.1f} minutes; results: {results.relative_to(ROOT)}")
    if arguments.page is not None:
        limit = f"At most {arguments.most_seconds:.0f} s of tests for each, the slowest left out."
        if arguments.again:
            limit += " What was noticed before tests were added was not run again."
        unmeasured = covering.unmeasured()
        if unmeasured:
            limit += f" Not measured, and so not run: {', '.join(unmeasured)}."
        listed = ROOT / "scripts/mutation/equivalents.yaml"
        report.write(arguments.page, drawn, done, seed=arguments.seed, file=listed, limit=limit)
    return int(any(line["outcome"] == "survived" for line in done.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/mutate", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default: 0")
    parser.add_argument("--count", type=int, default=100, help="mutants to draw; default: 100")
    parser.add_argument("--folders", nargs="+", choices=FOLDERS, default=FOLDERS, help="default: all")
    parser.add_argument("--processes", type=int, default=1, help="mutants that are run at a time; default: 1")
    parser.add_argument(
        "--most-seconds", type=float, default=300.0, help="of tests for one mutant, the slowest left out; default: 300"
    )
    parser.add_argument(
        "--as-measured",
        action="store_true",
        help="measures no test file; those not measured are run whole or not at all",
    )
    parser.add_argument("--again", action="store_true", help="runs only what no run of this seed has noticed")
    parser.add_argument("--page", type=Path, help="a page of the documentation to write the figures into")
    return parser.parse_args()


class _Run:
    """One run over some mutants; what was done before is not done again."""

    def __init__(
        self, source: Path, drawn: list[Mutant], covering: Covering, copies: list[Path], results: Path, log: Any
    ) -> None:
        self._source, self._drawn, self._covering = source, drawn, covering
        self._copies, self._results, self._log = copies, results, log
        self._equivalents = equivalents(source / "scripts/mutation/equivalents.yaml")
        self._evidence = _Evidence(source)
        self._free = list(copies)
        self._sound: dict[str, bool] = {}

    def run(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """Returns what came of each mutant, by key."""
        done = {line["key"]: line for line in self._known()}
        # A mutant may have been listed as equivalent since.
        done = {
            mutant.key: done[mutant.key]
            for mutant in self._drawn
            if mutant.key in done and (done[mutant.key]["outcome"] != "survived" or mutant.key not in self._equivalents)
        }
        open_ends: dict[Path, Any] = {}

        def children() -> Iterator[tuple[tuple[Mutant, Path], Child]]:
            for mutant in self._drawn:
                if mutant.key in done:
                    continue
                why = self._equivalents.get(mutant.key)
                if why is not None:
                    done[mutant.key] = self._note(mutant, "equivalent", why=why)
                    continue
                batches = self._covering.batches(mutant)
                if not batches:
                    done[mutant.key] = self._note(mutant, "survived", why="no test reaches the file")
                    _say(f"{len(done)}/{len(self._drawn)} survived {mutant.place}: no test reaches the file")
                    continue
                copy = self._free.pop()
                context = changed(copy / mutant.path, mutant.code((self._source / mutant.path).read_text()))
                context.__enter__()
                open_ends[copy] = context
                child = Child(copy, batches, expected=self._covering.seconds, log=self._log(str(copy.name)))
                yield (mutant, copy), child

        try:
            for (mutant, copy), outcome in run_all(children(), len(self._copies)):
                open_ends.pop(copy).__exit__(None, None, None)
                if outcome.why == "failed" and not self._passes_alone(outcome.failed or "", copy):
                    line = self._note(mutant, "unsound", outcome, why="the test fails alone without the error, too")
                else:
                    line = self._note(mutant, "noticed" if outcome.failed else "survived", outcome, why=outcome.why)
                self._free.append(copy)
                done[mutant.key] = line
                count = f"{len(done)}/{len(self._drawn)}"
                _say(f"{count} {line['outcome']} {mutant.place} {line['seconds']:.1f} s {outcome.failed or ''}")
        finally:
            for context in open_ends.values():
                context.__exit__(None, None, None)
        return done

    def _known(self) -> Iterator[dict[str, Any]]:
        """Yields what was noticed before by tests that are as they were, and all that was done in this state."""
        for file in sorted(self._results.parent.glob("*.jsonl")):
            for line in _read(file):
                noticed_by = self._evidence.of(line["test"])
                if line["outcome"] == "noticed" and noticed_by and line.get("evidence") == noticed_by:
                    yield line
        yield from _read(self._results)

    def _passes_alone(self, test: str, copy: Path) -> bool:
        """Returns whether a test that noticed an error passes by itself without one."""
        if test not in self._covering.seconds:
            return True  # a file that could not be imported
        if test not in self._sound:
            child = Child(copy, [[test]], expected=self._covering.seconds, log=self._log("alone"))
            ((_, outcome),) = run_all(iter([(test, child)]), 1)
            self._sound[test] = not outcome.failed
        return self._sound[test]

    def _note(self, mutant: Mutant, came_to: str, outcome: Outcome | None = None, *, why: str) -> dict[str, Any]:
        """Keeps what came of a mutant."""
        line = {
            "key": mutant.key,
            "place": mutant.place,
            "outcome": came_to,
            "why": why,
            "test": None if outcome is None else outcome.failed,
            "evidence": None if outcome is None else self._evidence.of(outcome.failed),
            "tests": 0 if outcome is None else len(outcome.seconds),
            "reached_by": self._covering.reaches(mutant),
            "seconds": 0.0 if outcome is None else outcome.wall,
        }
        with self._results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


class _Evidence:
    """What the word of a test rests on: its file, the library, and what tests share."""

    def __init__(self, source: Path) -> None:
        self._source = source
        paths = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        self._shared = [
            path
            for path in paths
            if path.startswith("hypertorch/") or (path.startswith("tests/") and not Path(path).name.startswith("test_"))
        ]
        self._digests: dict[str, str] = {}

    def of(self, test: str | None) -> str | None:
        """Returns a digest; None for what is no test."""
        file = (test or "").partition("::")[0]
        if not file or not (self._source / file).is_file():
            return None
        if file not in self._digests:
            self._digests[file] = digest(self._source, [*self._shared, file])
        return self._digests[file]


def _logs(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: folder / f"{name.replace('/', '-')}.log"


def _read(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{**line, "key": tuple(line["key"])} for line in lines]


def _noticed_before(results: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Returns what runs of this seed have noticed, whatever tests and library were then."""
    files = sorted(results.parent.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
    if not files:
        sys.exit("`--again` was asked for, but no run of this seed was made before. Leave it out for a first run.")
    return {line["key"]: line for file in files for line in _read(file) if line["outcome"] == "noticed"}


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
