"""What the commands that look at hypergradients share: their problem and backends, and the files they leave."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

import hypertorch as ht
from experiments.assembly import build
from experiments.failures import ExpectedFailure
from experiments.reads import Reads, check_settings_are_read
from experiments.reporting import versions
from experiments.run_folder import command
from experiments.settings import check_switch, chosen_device, chosen_dtype, listed_names, whole_number

Row = Mapping[str, Any]


def prepare(config: DictConfig, reads: Reads, *, resumes: bool = False) -> None:
    """Checks the settings that every command here reads and no class checks, and applies the number of threads.

    Args:
        config: the configuration.
        reads: what the command reads of it.
        resumes: whether the command can go on with an earlier run.

    Raises:
        ExpectedFailure: naming the setting, its value and what to write instead.
    """
    check_settings_are_read(config, reads)
    whole_number(config, "seed", minimum=0, purpose="it chooses the data and the first weights")
    if resumes:
        check_switch(config, "resume")
    elif config.resume is not False:
        raise ExpectedFailure(
            f"`resume` is {config.resume!r}, but this command has nothing to go on with: it writes its results at the "
            "end. Leave it out."
        )
    chosen_device(config)
    chosen_dtype(config)
    if config.num_threads is not None:
        torch.set_num_threads(whole_number(config, "num_threads", minimum=1, purpose="operations run on so many"))


def build_problem(config: DictConfig, num_steps: int) -> ht.BilevelProblem:
    """Returns the configured problem with a horizon (unit: steps)."""
    return build(
        config,
        "problem",
        num_steps=num_steps,
        seed=config.seed,
        device=chosen_device(config),
        dtype=chosen_dtype(config),
    )


def build_backends(config: DictConfig) -> dict[str, ht.Hypergradient]:
    """Returns the configured backends, or those that `only` names, by name.

    Raises:
        ExpectedFailure: if `only` names others.
    """
    names = [str(name) for name in config.backends]
    only = listed_names(config, "only", example=names[0])
    chosen = names if only is None else only
    for name in chosen:
        if name not in names:
            raise ExpectedFailure(
                f"`only` names {name!r}, which is not among the backends. Choose from: {', '.join(names)}."
            )
    return {name: build(config, f"backends.{name}") for name in chosen}


def ascending_lengths(config: DictConfig, key: str, *, minimum: int = 1) -> list[int]:
    """Returns a list of numbers of steps of the configuration, sorted.

    Raises:
        ExpectedFailure: if it is anything else.
    """
    values = OmegaConf.select(config, key)
    is_list = isinstance(values, ListConfig) and len(values) > 0
    if not is_list or any(isinstance(item, bool) or not isinstance(item, int) or item < minimum for item in values):
        raise ExpectedFailure(
            f"`{key}` is {values!r}, but a list of numbers of steps is needed, each at least {minimum}. Write for "
            f"example '{key}=[10,30,100]'."
        )
    return sorted(set(values))


def run_description() -> dict[str, Any]:
    """Returns what determines the numbers of a run, for results.json."""
    job = HydraConfig.get()
    return {
        "command": command(f"python experiments/{job.job.name}.py", job.overrides.task),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def json_ready(row: Row) -> dict[str, Any]:
    """Returns the row with None for numbers that JSON cannot hold."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def write_csv(path: Path, rows: Sequence[Row]) -> None:
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
