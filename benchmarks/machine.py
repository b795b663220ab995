"""What the figures were measured on and with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import psutil
from experiments.common.results.reporting import versions

_PEERS = ("higher", "torchopt", "optree", "jax", "jaxlib", "psutil")
_CPU_INFO = Path("/proc/cpuinfo")


def library_versions() -> dict[str, str | None]:
    """Returns the versions of what determines the numbers; None for a library that is not installed."""
    return {**versions(), **{name: _version(name) for name in _PEERS}}


def machine(device: torch.device) -> dict[str, Any]:
    """Returns processor, cores, threads, memory and load, and the GPU where it computes.

    Args:
        device: where the works are computed.
    """
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "physical_cores": None if psutil is None else psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "memory_bytes": None if psutil is None else psutil.virtual_memory().total,
        "torch_threads": torch.get_num_threads(),
        "load_average": load_average(),
        "gpu": None if gpu is None else gpu.name,
        "gpu_memory_bytes": None if gpu is None else gpu.total_memory,
        "cuda": torch.version.cuda,
    }


def load_average() -> list[float] | None:
    """Returns the mean number of running processes over 1, 5 and 15 minutes; None where the system does not say."""
    return list(os.getloadavg()) if platform.system() != "Windows" else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
