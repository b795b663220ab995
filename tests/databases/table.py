"""Runs PyTorch's databases through every exact backend and writes what came out as a page.

Usage:
    python -m tests.databases.table                # half an hour on one core; goes on where it was interrupted
    python -m tests.databases.table --page-only    # writes the page from what there is
    python -m tests.databases.table --again operators/svd modules/nn.LSTM
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from tests.databases.page import Results, page
from tests.databases.samples import MODULES, OPERATIONS, Sample, module_samples, operation_samples
from tests.databases.verdicts import WAYS, Verdict, judge

ROOT = Path(__file__).resolve().parents[2]
SAMPLES_PER_OPERATION = 3
SAMPLES_PER_MODE = 2


def main() -> None:
    """Runs what is missing, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "outputs" / "databases.jsonl", help="results so far")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "operations.md", help="the page to write")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--again", nargs="*", default=(), metavar="NAME", help="run these anew, such as operators/svd")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _known(options.results)
    for name in options.again:
        results.pop(name, None)
    if not options.page_only:
        _run(options.results, results)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    missing = [name for name in _subjects() if name not in results]
    options.page.write_text(page(results, _versions(), missing), encoding="utf-8")


def _subjects() -> list[str]:
    return [*(f"operators/{name}" for name in OPERATIONS), *(f"modules/{name}" for name in MODULES)]


def _versions() -> dict[str, str]:
    """Returns what the results hold for."""
    return {"PyTorch": torch.__version__, "Python": sys.version.split()[0]}


def _known(path: Path) -> Results:
    """Returns the results of earlier runs with the same versions and ways; a killed run may have cut the last line."""
    results: Results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["versions"] == _versions() and entry["ways"] == list(WAYS):
            results[entry["name"]] = {
                sample: {way: Verdict(*verdict) for way, verdict in verdicts.items()}
                for sample, verdicts in entry["samples"].items()
            }
    return results


def _run(path: Path, results: Results) -> None:
    subjects = _subjects()
    missing = [name for name in subjects if name not in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with path.open("a", encoding="utf-8") as file:
        for place, name in enumerate(missing, start=1):
            results[name] = {sample.name: judge(sample) for sample in samples_of(name)}
            entry = {"name": name, "versions": _versions(), "ways": list(WAYS), "samples": results[name]}
            # A line of its own even after one that a kill has cut.
            file.write("\n" + json.dumps(entry))
            file.flush()
            seconds = time.perf_counter() - start
            words = sorted({verdict.word for verdicts in results[name].values() for verdict in verdicts.values()})
            sys.stdout.write(
                f"{len(subjects) - len(missing) + place}/{len(subjects)}  {seconds:.0f} s, "
                f"{seconds / place * (len(missing) - place):.0f} s left  {name}: {', '.join(words) or 'no sample'}\n"
            )
            sys.stdout.flush()


def samples_of(name: str) -> list[Sample]:
    """Returns the first samples of `operators/NAME` or `modules/NAME`."""
    database, _, subject = name.partition("/")
    if database == "operators":
        return operation_samples(subject, SAMPLES_PER_OPERATION)
    return module_samples(subject, SAMPLES_PER_MODE)


if __name__ == "__main__":
    main()
