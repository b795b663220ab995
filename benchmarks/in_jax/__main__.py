"""The process of a JAX contestant: `python benchmarks/in_jax FOLDER`.

It is run by its folder and not as a module of the package, so that nothing imports PyTorch: the thread pools of the
two disturb each other. The folder holds `settings.json` and `job.npz`. Lines of stdin are answered by lines of JSON:
"ready" when everything is loaded; "first" for the first run, whose hypergradient is left in the folder; "turn N" for
the mean time of N runs in a row; "trim" gives memory that was freed back to the system.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import numpy as np
from hypergradient import hypergradient


def main() -> None:
    """Answers until stdin ends."""
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    jax.config.update("jax_enable_x64", settings["float64"])
    parts: dict[str, dict[str, jax.Array]] = {"hparams": {}, "params": {}, "data": {}}
    with np.load(folder / "job.npz") as held:
        for key in held:
            part, _, name = key.partition("/")
            parts[part][name] = jax.device_put(held[key])
    compiled = hypergradient(settings)

    def run() -> dict[str, jax.Array]:
        return jax.block_until_ready(compiled(parts["hparams"], parts["params"], parts["data"]))

    jax.block_until_ready(parts)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        answer: dict[str, object] = {}
        match line.split():
            case ["first"]:
                grads: list[dict[str, jax.Array]] = []
                answer = {"seconds": _seconds(lambda kept=grads: kept.append(run()), 1), "prepares": True}
                arrays: dict[str, Any] = {name: np.asarray(value) for name, value in grads[0].items()}
                np.savez(folder / "grads.npz", **arrays)
            case ["turn", number]:
                answer = {"seconds": _seconds(run, int(number))}
            case ["trim"] if sys.platform == "linux":
                getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _seconds(run: Callable[[], object], number: int) -> float:
    gc.collect()
    start = time.perf_counter()
    for _ in range(number):
        run()
    return (time.perf_counter() - start) / number


main()
