"""What a run leaves for its reader: a table on the screen, figures in results.json."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure

try:
    import resource
except ImportError:  # Windows has none
    resource = None


def peak_memory_mib(device: torch.device) -> float | None:
    """Returns the largest memory used so far (unit: MiB): the GPU's, or this process's; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    # Linux counts in KiB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def hardware(device: torch.device) -> str:
    """Returns what a run computed on, such as `cpu, x86_64` or `cuda, NVIDIA H100`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type}, {name}"


def versions() -> dict[str, str]:
    """Returns the versions of what determines the numbers."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return {"hypertorch": ht.__version__, "python": platform.python_version(), **packages}


def report_as_dict(report: ht.Report) -> dict[str, dict[str, float | int | None]]:
    """Returns an evaluation in the form of results.json; a figure that is not finite becomes None."""
    return {
        name: {
            "mean": _finite(estimate.mean),
            "half_width_95": _finite(estimate.half_width),
            "num_episodes": estimate.count,
        }
        for name, estimate in report.metrics.items()
    }


def check_figures(reports: Mapping[str, ht.Report], what: str) -> None:
    """Checks that every figure is a number.

    An accuracy always is one: where all outputs are NaN, every image is given the first class. Its loss tells.

    Args:
        reports: by split.
        what: what was judged, for the message.

    Raises:
        ExpectedFailure: naming the first figure that is not.
    """
    for split, report in reports.items():
        for name, estimate in report.metrics.items():
            if not math.isfinite(estimate.mean):
                raise ExpectedFailure(
                    f"`{name}` of {what} is {estimate.mean} on {split}: the network's outputs left the finite numbers, "
                    "so no figure of it says anything. Lower the learning rates (outer_optimizer.lr, dynamics.lr), or "
                    "bound the hypergradient by outer_loop.clip_norm; the checkpoints stay."
                )


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes results.json, whole or not at all.

    Args:
        path: the file.
        results: what goes into it.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({**results, "written": now}, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def print_reports(console: Console, title: str, reports: Mapping[str, ht.Report]) -> None:
    """Prints figures by split, each with its 95 % interval.

    Args:
        console: where to.
        title: the line above.
        reports: by split.
    """
    table = Table(title=title, title_justify="left", caption="mean ± 95 % interval", caption_justify="left")
    table.add_column("split")
    names = list(dict.fromkeys(name for report in reports.values() for name in report.metrics))
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("episodes", justify="right")
    for split, report in reports.items():
        # A figure of the outcome alone, such as how it ranks its baselines, is none of theirs.
        figures = [_figure(name, report.metrics[name]) if name in report.metrics else "" for name in names]
        table.add_row(split, *figures, str(next(iter(report.metrics.values())).count))
    console.print(table)


def _figure(name: str, estimate: ht.Estimate) -> str:
    percent = name == "accuracy"
    scale, digits, unit = (100.0, 2, " %") if percent else (1.0, 4, "")
    interval = "" if math.isnan(estimate.half_width) else f" ± {scale * estimate.half_width:.{digits}f}"
    return f"{scale * estimate.mean:.{digits}f}{interval}{unit}"


def duration(seconds: float) -> str:
    """Returns a time for people, such as `4 min 12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def json_ready(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row with None for numbers that JSON cannot hold."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a table with a column for every name that any of them has.

    Args:
        path: the file.
        rows: by column; what a row lacks is left empty.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
