"""One of two processes that share the cases; called as `pair RANK SIZE FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import hypertorch as ht
from tests.ranks.cases import CASES, lost, run


def main(rank: int, size: int, folder: Path) -> None:
    """Runs all cases beside the other processes, and writes what this one finds."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # A file instead of a port, which another program could have taken.
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    found = {}
    with ht.join_ranks() as ranks:
        assert ranks is not None
        for name in CASES:
            found[name] = run(name, ranks, folder)
        torch.save(found, folder / f"found_{rank}.pt")
        # Last, as it ends one of them.
        (folder / "lost.json").write_text(json.dumps(lost(ranks, folder)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
