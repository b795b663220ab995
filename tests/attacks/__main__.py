"""Carries out all attacks and prints what came of them, by kind: `python -m tests.attacks`."""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import torch

from tests.attacks.attack import Verdict, judge
from tests.attacks.tables import by_kind

# An input that asks for more than this is to be refused, not to take the machine down (unit: bytes).
MEMORY = 4 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="only these kinds")
    chosen = parser.parse_args().kinds
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    verdicts: dict[str, list[Verdict]] = {}
    for kind, attacks in by_kind().items():
        if chosen and not any(word in kind for word in chosen):
            continue
        for attack in attacks:
            with tempfile.TemporaryDirectory() as folder:
                verdict = judge(attack, Path(folder))
            verdicts.setdefault(kind, []).append(verdict)
            if verdict.fault is not None:
                sys.stdout.write(f"{kind}: {attack.name}: {verdict.fault}\n")
                sys.stdout.flush()
    sys.stdout.write("| kind | inputs | refused | longest (s) |\n| --- | --- | --- | --- |\n")
    for kind, ones in verdicts.items():
        refused = sum(one.fault is None for one in ones)
        sys.stdout.write(f"| {kind} | {len(ones)} | {refused} | {max(one.seconds for one in ones):.2f} |\n")


if __name__ == "__main__":
    main()
