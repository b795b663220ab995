"""What the commands that look at hypergradients share: their problem and backends, and the files they leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import hypertorch as ht
from experiments.common.building import build
from experiments.common.failures import ExpectedFailure
from experiments.common.reporting import versions
from experiments.common.run_folder import command
from experiments.common.settings import chosen_device, chosen_dtype, listed_names

Row = Mapping[str, Any]


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


def run_description() -> dict[str, Any]:
    """Returns what determines the numbers of a run, for results.json."""
    job = HydraConfig.get()
    return {
        "command": command(f"python experiments/{job.job.name}.py", job.overrides.task),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
    }
