"""The hypergradient by JAX, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.contestant import Contestant, NotMeasured, Outcome, Side
from benchmarks.job import Job
from benchmarks.worker import Worker

_PROGRAM = Path(__file__).resolve().with_name("in_jax")


@dataclass(frozen=True, kw_only=True)
class InJax(Contestant):
    """`jax.jit` of `jax.grad` through a `lax.scan` over the inner steps, tasks by `jax.vmap`: what a user writes.

    It gets the job's data and weights as arrays, and the networks and losses are written out once more in JAX.

    Args:
        remat: whether steps are in `jax.checkpoint`: only states are kept, and a step is computed again on the way
            back.
        unroll: whether the compiled program has all steps one after the other instead of a loop, which takes longer to
            compile and can be the faster.
        tasks: "vmap" for all at once, "in turn" for a call of the compiled program for each: the faster where every
            task has convolutions of its own.
    """

    remat: bool = False
    unroll: bool = False
    tasks: Literal["vmap", "in turn"] = "vmap"
    side: Side = field(default="by hand", init=False)
    compiles: bool = field(default=True, init=False)
    own_framework: bool = field(default=True, init=False)

    @property
    def library(self) -> str:
        """The library's name in the table."""
        return "JAX"

    def command(self, job: Job, folder: Path) -> list[str]:
        """Returns the command of its process, for which it leaves the job in the folder.

        Raises:
            NotMeasured: if there is no JAX, or it cannot compute the job.
        """
        if importlib.util.find_spec("jax") is None:
            raise NotMeasured("jax is not installed (it comes with the extra `benchmark`)")
        stated = job.stated
        if stated is None:
            raise NotMeasured("the work is not written in JAX")
        params = dict(job.network.named_parameters())
        some = next(iter(params.values()))
        if some.device.type != "cpu":
            raise NotMeasured(f"the JAX of the extra `benchmark` computes on a CPU, the work is on {some.device}")
        parts = {"hparams": job.hparams, "params": params, "data": stated.data}
        arrays = {
            f"{part}/{name}": value.detach().numpy() for part, values in parts.items() for name, value in values.items()
        }
        np.savez(folder / "job.npz", **arrays)
        settings = {
            "network": stated.network,
            "network_settings": stated.network_settings,
            "losses": stated.losses,
            "loss_settings": stated.loss_settings,
            "num_steps": job.num_steps,
            "lr": job.lr,
            "momentum": job.momentum,
            "num_tasks": job.num_tasks,
            "initialisation": sorted(job.initialisation),
            "remat": self.remat,
            "unroll": self.unroll,
            "tasks": self.tasks,
            "float64": some.dtype is torch.float64,
        }
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        return [sys.executable, str(_PROGRAM), str(folder)]

    def run(self, job: Job) -> Outcome:
        """Returns the hypergradient, by a process that is started for it: nothing to be timed."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = self.command(job, folder)
            worker = Worker(command, folder=folder, environment={}, num_cores=None, ends=math.inf)
            try:
                return Outcome(grads=worker.first().grads)
            finally:
                worker.close()
