"""What a search must know of the command whose settings it chooses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from hypertorch.checks.argument_types import typed

Direction: TypeAlias = Literal["max", "min"]
Task = TypeVar("Task", bound=Callable[..., Any])

_ATTRIBUTE = "searched_command"


@dataclass(frozen=True, kw_only=True)
class FailedTrial:
    """What a trial returns in place of its value if it failed in a way that says something of its settings.

    Args:
        why: the message.
    """

    why: str


class SearchedCommand(ABC):
    """What the sweeper asks of a command; a configuration is that of one trial, without Hydra's part.

    `searchable` attaches it to the function that `hydra.main` decorates. A trial returns the value of the objective,
    the list of values where `hydra.sweeper.objectives` lists several, or a `FailedTrial`.

    Attributes:
        program: how the command is called, such as "scripts/train".
    """

    program: str

    @abstractmethod
    def check(self, config: Any) -> Mapping[str, Direction]:
        """Returns the objectives that a trial can report, each with the direction that is better.

        Raises:
            Exception: if a trial with this configuration would be refused, in words for the user.
        """

    def check_searched(self, names: Sequence[str]) -> None:  # noqa: B027 (a command need not refuse any)
        """Checks that trials that differ in some settings can be compared by their objectives; by default all can.

        Args:
            names: of the settings that are searched, as on the command line.

        Raises:
            Exception: if one of them changes what the objectives measure, in words for the user.
        """

    @abstractmethod
    def length(self, config: Any) -> int:
        """Returns the length of a trial (unit: outer steps)."""

    @abstractmethod
    def lengthened(self, config: Any, num_steps: int) -> list[str]:
        """Returns the overrides with which a trial runs up to a rung.

        Args:
            config: of the whole trial.
            num_steps: where the rung ends (unit: outer steps).
        """

    @abstractmethod
    def check_rungs(self, rungs: Sequence[Any]) -> None:
        """Checks that a trial that goes on from one rung to the next ends as one that runs straight.

        Args:
            rungs: the configurations of one trial, one for each rung.

        Raises:
            Exception: if it would not, in words for the user.
        """

    @abstractmethod
    def continued(self, objectives: Sequence[str]) -> list[str] | None:
        """Returns the overrides with which a trial goes on in its folder, and begins where nothing is in it.

        Args:
            objectives: what the trials report.

        Returns:
            None if one of them would be that of the last part only, so that a trial begins anew.
        """

    @abstractmethod
    def seeded(self, config: Any, index: int) -> list[str]:
        """Returns the overrides of the repetition of a trial with another seed; number 0 is the trial itself."""

    @abstractmethod
    def identifying(self, overrides: Sequence[str]) -> list[str]:
        """Returns the overrides that say what is computed, not where or how it is shown."""


@typed("command")
def searchable(command: SearchedCommand) -> Callable[[Task], Task]:
    """Returns a decorator for the function under `hydra.main`, from which the sweeper learns what it searches.

    Args:
        command: what it must know.
    """

    def attach(task: Task) -> Task:
        setattr(task, _ATTRIBUTE, command)
        return task

    return attach


def command_of(task: Callable[..., Any]) -> SearchedCommand | None:
    """Returns what `searchable` attached to a function; None if it attached nothing."""
    return getattr(task, _ATTRIBUTE, None)
