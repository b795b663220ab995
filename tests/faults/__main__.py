"""Kills runs, lets two meet, and runs long ones; prints what was seen and writes it into docs/faults.md.

.venv/bin/python -m tests.faults --kills 100 --seed 0
.venv/bin/python -m tests.faults kills meetings --short --no-page
"""

from __future__ import annotations

import argparse
import gc
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from experiments.common.results.reporting import versions
from experiments.common.results.result_page import table
from tests.faults import kills
from tests.faults.campaign import Campaign, Tally
from tests.faults.runs import ANEW, COMMANDS, LOOPS, SEARCH, TRAIN, Run
from tests.faults.soak import COMPILED, FAMILIES, Growth, soak_alone
from tests.faults.two_processes import meet
from tests.outer.problems import Quadratics
from tests.outer.runs import full_loop

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
PARTS = ("kills", "meetings", "soak")
LIMIT = 1024.0  # bytes per outer step
# Of a hundred random SIGKILLs; a start of a command takes long.
_SHARE = {**dict.fromkeys(LOOPS, 14), **dict.fromkeys(COMMANDS, 12), **dict.fromkeys(ANEW, 3)}


def random_kills(num_kills: int, *, short: bool) -> Iterator[tuple[Run, str, int]]:
    """Gives runs, kinds and how many kills of each.

    Of SIGKILL there are as many as are asked for, of each other kind a tenth; in the short form, one of one other kind.
    """
    runs = {**LOOPS, **({} if short else COMMANDS), **({} if short else ANEW)}
    others = [kind for kind in kills.KINDS if kind != "SIGKILL"]
    for position, (name, run) in enumerate(runs.items()):
        own = -(-num_kills // len(runs)) if short else round(num_kills * _SHARE[name] / 100)
        yield run, "SIGKILL", own
        if short:
            yield run, others[position % len(others)], 1
        elif name not in ANEW:
            yield from ((run, kind, -(-own // 10)) for kind in others)


def aimed_kills(*, short: bool) -> Iterator[tuple[Run, dict[str, tuple[kills.Aim, ...]]]]:
    """Gives runs and aims; in the short form, each aim at one of the loops."""
    for position, run in enumerate(LOOPS.values()):
        chosen = enumerate(kills.AIMED.items())
        yield run, dict(item for index, item in chosen if not short or index % len(LOOPS) == position)
    if not short:
        yield COMMANDS[TRAIN], kills.AIMED_AT_TRAINING
        yield COMMANDS[SEARCH], kills.AIMED_AT_A_SEARCH


def kill(num_kills: int, seed: int, folder: Path, *, short: bool, say: Callable[[str], None]) -> tuple[list[str], bool]:
    """Returns the lines about killed runs, and whether all came back."""
    _warm_up(folder)
    rows: list[list[str]] = []
    total, campaigns = Tally(), dict[str, Campaign]()

    def campaign(run: Run) -> Campaign:
        if run.name not in campaigns:
            campaigns[run.name] = Campaign(run, folder / str(len(campaigns)), seed)
        return campaigns[run.name]

    def note(run: Run, kind: str, tally: Tally) -> None:
        total.add(tally)
        counts = (tally.kills, tally.resumed, tally.same, tally.lost, tally.doubled, tally.leftovers)
        rows.append([run.name, kind, *map(str, counts)])
        say(" | ".join(rows[-1]))
        for fault in tally.faults:
            say(f"FAULT: {fault}")

    for run, kind, number in random_kills(num_kills, short=short):
        note(run, kind, campaign(run).at_random(kind, number))
    for run, aimed in aimed_kills(short=short):
        tally = Tally()
        for name, aims in aimed.items():
            tally.add(campaign(run).aimed(name, aims))
        note(run, f"SIGKILL, aimed ({len(aimed)} kinds)", tally)
    headings = ["run", "kind", "kills", "runs resumed", "same bits", "records lost", "doubled", "files left over"]
    counts = (total.kills, total.resumed, total.same, total.lost, total.doubled, total.leftovers)
    rows.append(["all", "", *map(str, counts)])
    return table(headings, rows), not total.faults


def _meetings(num_trials: int, seed: int, folder: Path) -> tuple[list[str], bool]:
    named = meet(LOOPS["`OuterLoop`"], folder, num_trials, seed)
    line = (
        f"{num_trials} trials: in each, one process went on to the undisturbed outcome and the other was refused; "
        f"{named} refusals had the process and the host of the first."
    )
    return [line], True


def _soak(num_steps: int, folder: Path, *, short: bool, say: Callable[[str], None]) -> tuple[list[str], bool]:
    _warm_up(folder)
    rows, is_flat = [], True
    for position, name in enumerate({**FAMILIES, **({} if short else COMPILED)}):
        growth = soak_alone(name, num_steps, folder / str(position))
        rows.append([name, f"{growth.bytes:.0f}", str(growth.tensors), str(growth.objects)])
        say(" | ".join(rows[-1]))
        is_flat &= flat(growth, num_steps)
    return table(["run", "bytes per outer step", "more tensors", "more objects"], rows), is_flat


def flat(growth: Growth, num_steps: int) -> bool:
    """Returns whether a run kept nothing of its steps; of few steps memory and objects say little yet."""
    is_small = num_steps < 1000 or growth.bytes < LIMIT
    return is_small and growth.tensors <= 0 and growth.objects < max(num_steps // 2, 100)


def _warm_up(folder: Path) -> None:
    """Imports what PyTorch imports late, which takes longer than a run, before there are children."""
    full_loop(folder / "first", Quadratics(num_steps=1)).run(6)
    gc.collect()
    gc.freeze()


def write_section(page: Path, part: str, lines: Sequence[str]) -> None:
    """Replaces what stands between the marks of a part."""
    start, end = f"<!-- {part}: written by tests/faults -->", f"<!-- end of {part} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    page.write_text("\n".join([f"{before}{start}", "", *lines, "", f"{end}{after}"]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at random moments")
    parser.add_argument("--meetings", type=int, default=20, help="times that two processes resume one run")
    parser.add_argument("--steps", type=int, default=2000, help="outer steps of a soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="the form of the test suite: loops, nothing compiled")
    parser.add_argument("--no-page", action="store_true", help="leave docs/faults.md as it is")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    all_right = True
    for part in asked.parts:
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        if part == "kills":
            lines, is_right = kill(asked.kills, asked.seed, folder, short=asked.short, say=say)
        elif part == "meetings":
            lines, is_right = _meetings(asked.meetings, asked.seed, folder)
        else:
            lines, is_right = _soak(asked.steps, folder, short=asked.short, say=say)
        if is_right:  # else it shows what went wrong
            shutil.rmtree(folder)
        all_right &= is_right
        say("\n".join(lines))
        command = shlex.join([".venv/bin/python", "-m", "tests.faults", *sys.argv[1:]])
        seen = ", ".join(f"{name} {version}" for name, version in versions().items())
        if not asked.no_page:
            write_section(PAGE, part, [f"`{command}` ({seen}):", "", *lines])
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
