"""A long unroll within a bound on memory, with kept states in a file, against one short enough to need none.

python -m benchmarks.long_unroll --steps 2000
python -m benchmarks.long_unroll --steps 100000 --memory 1GiB --folder /var/tmp

The work is example weights of an MLP 784-256-10. Printed are time per step, the memory of the process and the bytes on
disk. The bound is on what is resident of the whole process, PyTorch itself included; pages of the file are the
system's cache and not of the process.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
from rich.console import Console

import hypertorch as ht
from benchmarks.command_words import count, folder, size
from benchmarks.large_unroll import LargeUnroll
from hypertorch.autodiff.live_memory import format_bytes, storage_bytes
from hypertorch.hypergradients import Reverse, plan_memory

_AGAINST = 1000  # steps of the run whose kept states lie in memory
_SLACK = 0.4  # of what is left to the backend: tensors are counted, and an allocator takes up to twice as much


def resident() -> int:
    """Returns the bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def most_resident() -> int:
    """Returns the most that `resident` has been."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size_of_state(problem: ht.BilevelProblem) -> int:
    """Returns the bytes of a state of gradient descent, which are those of the params."""
    return storage_bytes(problem.inner.init_params(problem.init_hparams()).values())


def seconds_per_step(problem: ht.BilevelProblem, backend: Reverse) -> float:
    """Returns the time of a hypergradient, divided by the inner steps."""
    hparams = problem.init_hparams()
    before = time.perf_counter()
    ht.hypergradient(problem, hparams, backend=backend)
    return (time.perf_counter() - before) / problem.num_steps


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=count, default=2000, help="inner steps")
    parser.add_argument("--rows", type=count, default=100, help="training examples, all of them in every step")
    parser.add_argument("--memory", type=size, default="1GiB", help="bound on the process, such as 1GiB")
    parser.add_argument("--every", type=count, help="steps between kept states, which all lie in the file; no plan")
    parser.add_argument("--against", type=count, default=_AGAINST, help="steps of the run that is compared with")
    parser.add_argument(
        "--folder", type=folder, default=tempfile.gettempdir(), help="where the file of kept states lies"
    )
    settings = parser.parse_args(arguments)
    if settings.every is not None and settings.every > settings.steps:
        parser.error(f"argument --every: {settings.every} between kept states is more than --steps {settings.steps}")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; returns 1 if the bound was not kept."""
    settings = parsed(arguments)
    console, bound = Console(highlight=False, soft_wrap=True), settings.memory

    def problem(num_steps: int) -> ht.BilevelProblem:
        work = LargeUnroll(num_steps=num_steps, num_rows=settings.rows)
        return work.job(seed=0, device=torch.device("cpu"), dtype=torch.float32).problem()

    short, long = problem(settings.against), problem(settings.steps)
    seconds_per_step(problem(20), Reverse(checkpoint_every="sqrt"))  # what is done once
    by_sqrt = seconds_per_step(short, Reverse(checkpoint_every="sqrt"))
    console.print(f'{settings.against:,} steps, checkpoint_every="sqrt": {1000 * by_sqrt:.2f} ms per step')

    if settings.every is None:
        budget = int(_SLACK * (bound - resident()))
        if budget <= 0:
            raise SystemExit(f"--memory {format_bytes(bound)}: the process takes {format_bytes(resident())} already.")
        console.print(plan_memory(long, long.init_hparams(), budget, spill=True).explain())
        backend = Reverse(memory_budget=budget, spill_to=settings.folder)
    else:
        spilled, state = ceil(settings.steps / settings.every) - 1, size_of_state(long)
        console.print(f"{spilled} states of {format_bytes(state)} in a file of {format_bytes(spilled * state)}")
        backend = Reverse(checkpoint_every=settings.every, spill_to=settings.folder)
    seconds = seconds_per_step(long, backend)
    console.print(f"{settings.steps:,} steps: {1000 * seconds:.2f} ms per step, {seconds / by_sqrt:.2f} of that")
    console.print(f"the process took {format_bytes(most_resident())} at most, of {format_bytes(bound)}")
    return int(most_resident() > bound)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
