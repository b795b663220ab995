"""The works of the benchmark, for the tests of its parts."""

from __future__ import annotations

import torch

from benchmarks import (
    ConvHyperRepresentation,
    ConvMAML,
    ForwardCost,
    LargeUnroll,
    ParameterGrowth,
    ReversibleUnroll,
    SinusoidMAML,
    SmallUnroll,
    TransformerUnroll,
)
from benchmarks.job import Job
from benchmarks.memory import MemoryRequest
from benchmarks.work import Work

CPU = torch.device("cpu")
WORKS: dict[str, Work] = {
    "sinusoid": SinusoidMAML(),
    "small": SmallUnroll(),
    "large": LargeUnroll(),
    "very long": LargeUnroll(num_steps=10_000),
    "transformer": TransformerUnroll(),
    "reversible": ReversibleUnroll(),
    "forward": ForwardCost(),
    "params": ParameterGrowth(),
    "conv maml": ConvMAML(),
    "conv maml strided": ConvMAML(downsample="stride"),
    "conv representation": ConvHyperRepresentation(),
    "conv representation strided": ConvHyperRepresentation(downsample="stride"),
}


def job_of(work: Work, seed: int = 0) -> Job:
    return work.job(seed=seed, device=CPU, dtype=torch.float64)


def memory_request(work: Work, contestant: str, limit: int = 2**32) -> MemoryRequest:
    return MemoryRequest(
        work=work, contestant=contestant, seed=0, device="cpu", dtype=torch.float32, num_threads=1, limit=limit,
        longest=120.0,
    )  # fmt: skip
