"""What a work is: a job of given sizes, the contestants that take it on, and the ratios to be reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from benchmarks.contestant import Contestant
from benchmarks.job import Job

Quantity: TypeAlias = Literal["time", "memory"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure to be reached: the contestant's quantity is at most `at_most` times that of `against`.

    Args:
        contestant: whose figure.
        quantity: "time" (the fastest repetition), "memory" (the peak), or the name of a figure it counts itself.
        against: "peers" for the best of the other libraries (the fastest, or the leanest), the name of a contestant,
            the name of another figure of its own, or "bytes" for an absolute bound.
        at_most: the ratio, or the bytes.
    """

    contestant: str
    quantity: Quantity | str
    against: str
    at_most: float


class Work(ABC):
    """A job in given sizes, which are the fields of the subclass (a frozen dataclass).

    The data are made by a generator of their own from a seed, so that every process makes the same.
    """

    @property
    @abstractmethod
    def title(self) -> str:
        """What is computed, with its sizes, for the table."""

    @abstractmethod
    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data.

        Args:
            seed: of data and first weights.
            device: where the tensors are.
            dtype: of the tensors.
        """

    @abstractmethod
    def contestants(self) -> Mapping[str, Contestant]:
        """Returns who takes part, by name; the first that gives a hypergradient is the reference of the others."""

    def targets(self) -> tuple[Target, ...]:
        """Returns the ratios to be reached at these sizes; none unless overridden."""
        return ()

    @abstractmethod
    def tiny(self) -> Work:
        """Returns the same work in sizes that take no time, for a look at whether everything runs."""
