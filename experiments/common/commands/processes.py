"""Commands under `torchrun`: several processes that share one run, of which the first writes."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from time import process_time

from hydra._internal.utils import get_args_parser

import hypertorch as ht
from hypertorch.inner.ranks import number_of_processes

_ANOTHER_MODE = re.compile(r"\+{0,2}hydra\.mode=(?!RUN$|null$)")


def is_first_process() -> bool:
    """Returns whether this process is the one of its run that writes."""
    return number_of_processes() == 1 or os.environ.get("RANK") == "0"


def is_restarted() -> bool:
    """Returns whether `torchrun --max-restarts` started the processes again after one was lost."""
    return number_of_processes() > 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def why_not_shared(*, is_shared: bool) -> str | None:
    """Returns why the present command cannot run on the processes that `torchrun` started; None if it can.

    Args:
        is_shared: whether its processes can share a run.
    """
    count = number_of_processes()
    if count == 1:
        return None
    if not is_shared:
        return (
            f"`WORLD_SIZE` is {count}, but this command runs on one process: each would do all of the work. Start it "
            "without torchrun. experiments/train.py runs on several."
        )
    # By Hydra's own parser, which takes the beginning of a flag for the flag.
    words = get_args_parser().parse_known_args()[0]
    if words.multirun or any(_ANOTHER_MODE.match(word) for word in words.overrides):
        return (
            f"`WORLD_SIZE` is {count}, but a multirun starts its runs itself: each process would start all of them. "
            "Start it without torchrun, and run its jobs beside each other by hydra/launcher=joblib or "
            "hydra/launcher=submitit_slurm."
        )
    return None


@cache
def own_folder() -> Path:
    """Returns a folder for what a process other than the first would write; it is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="hypertorch_process_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def cpu_seconds_of_others(ranks: ht.Ranks | None) -> float:
    """Returns the CPU time that the other processes of a run have taken so far (unit: seconds)."""
    if ranks is None:
        return 0.0
    return sum(seconds for rank, seconds in enumerate(ranks.objects(process_time)) if rank != ranks.rank)
