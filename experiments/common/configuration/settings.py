"""The settings that commands share, each declared once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from experiments.common.configuration.execution import ExecutionSettings
from experiments.common.configuration.readers import (
    device,
    dtype,
    listed_names,
    optional,
    package_names,
    seed_number,
    switch,
    text,
    thread_count,
    whole_number,
)
from experiments.common.configuration.typed_settings import setting


@dataclass(frozen=True, kw_only=True)
class ProblemSettings:
    """What every command that builds an experiment's problems reads.

    Args:
        seed: chooses the first weights and the data.
        device: where to compute.
        dtype: of the tensors.
        threads: threads of PyTorch on the CPU; None for its own choice.
        execution: how the problems are run.
    """

    seed: int = setting(partial(seed_number, purpose="it chooses the first weights and the data"))
    device: torch.device = setting(device)
    dtype: torch.dtype = setting(dtype)
    threads: int | None = setting(optional(thread_count))
    execution: ExecutionSettings

    def set_threads(self) -> None:
        """Sets the number of threads that PyTorch computes on, where there is one."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What a training run reads of the outer loop itself; the rest are arguments of `OuterLoop`.

    Args:
        num_outer_steps: the length of the run (unit: outer steps).
        progress: whether progress is shown.
    """

    num_outer_steps: int = setting(partial(whole_number, minimum=1, purpose="it is the length of the run"))
    progress: bool = setting(switch)


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """When a run is validated.

    Args:
        every: outer steps between two validations.
        num_episodes: episodes of each.
    """

    every: int = setting(partial(whole_number, minimum=1, purpose="it is the outer steps between two validations"))
    num_episodes: int = setting(partial(whole_number, minimum=1, purpose="a validation is a mean over episodes"))


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What the outcome of a run is judged on.

    Args:
        splits: names of the experiment's splits; None for all.
        num_episodes: episodes of each.
    """

    splits: list[str] | None = setting(partial(listed_names, example="meta_val"))
    num_episodes: int = setting(partial(whole_number, minimum=1, purpose="the evaluation is a mean over episodes"))


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ProblemSettings):
    """What a training run reads, beside what its experiment reads.

    Args:
        resume: whether to go on with an earlier run.
        start_from: folder of a run, or file, with the outer variables to start from; None for fresh ones.
        trust: packages whose classes the configuration in `start_from` may name.
        outer_loop: the length of the run.
        validation: when it is validated.
        evaluation: what its outcome is judged on.
    """

    resume: bool = setting(switch)
    start_from: str | None = setting(optional(text))
    trust: list[str] = setting(package_names)
    outer_loop: LoopSettings
    validation: ValidationSettings
    evaluation: EvaluationSettings
