"""What a user writes: an inner problem, an outer problem, and the two joined into a bilevel problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from inspect import signature
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from hypertorch.checks.values import check_seed, is_count
from hypertorch.constraints import Constraint
from hypertorch.dynamics import Dynamics
from hypertorch.dynamics.settings import Setting, is_schedule
from hypertorch.types import Batch, TensorDict

Context: TypeAlias = Callable[[TensorDict, Batch], TensorDict]
"""`(hparams, outer batch) -> tensors` that are computed once, before the inner loop."""


class _AsksForContext:
    """Which methods of a user's class have the context handed to them apart from the outer variables."""

    asks_for_context: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Asked once for a class, not at every run.
        cls.asks_for_context = frozenset(
            name
            for name in ("init_params", "loss", "step_loss", "metrics")
            if hasattr(cls, name) and "context" in signature(getattr(cls, name)).parameters
        )


class InnerProblem(_AsksForContext, ABC):
    """The problem that is solved by training: its variables, its data and its loss `L(params, hparams)`.

    A method with one more argument, called `context`, is handed the tensors of the problem's context by it, and the
    outer variables alone by `hparams`; other methods find both in `hparams`.

    Attributes:
        buffers: names of the entries of `init_params` that are carried along but not trained (running statistics).
            The dynamics never see them; `loss` returns their new values.
    """

    buffers: tuple[str, ...] = ()

    @abstractmethod
    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the inner variables before the first step; they may depend on `hparams`, or be some of them."""

    def batch(self, step: int) -> Batch:
        """Returns the data of an inner step, a pure function of its index: a replayed step sees the same data."""
        return None

    @abstractmethod
    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor | tuple[Tensor, TensorDict]:
        """Returns the scalar inner loss, or the loss and the new values of the `buffers`."""

    def full_batch(self) -> Batch:
        """Returns the data that defines the inner solution, for backends that differentiate at it alone.

        Unless overridden they take the batch of the last inner step.
        """
        # Not abstract: most problems leave it out, and `has_full_batch` tells whether a subclass has it.
        raise TypeError("this inner problem names no data of its solution")

    @property
    def has_full_batch(self) -> bool:
        """Whether the problem names the data of its solution."""
        return type(self).full_batch is not InnerProblem.full_batch


class OuterProblem(_AsksForContext, ABC):
    """The problem that judges the trained params: outer variables, held-out data and the loss `E(params, hparams)`.

    A method with one more argument, called `context`, is handed the tensors of the problem's context by it, and the
    outer variables alone by `hparams`; other methods find both in `hparams`.
    """

    @abstractmethod
    def init_hparams(self) -> TensorDict:
        """Returns the outer variables before the first outer step."""

    def constraints(self) -> Mapping[str, Constraint]:
        """Returns the sets that the outer variables are kept in, by name or pattern; none unless overridden.

        They win over the natural constraints of the dynamics, and those that the loop is given win over them.
        """
        return {}

    def batch(self, outer_step: int) -> Batch:
        """Returns the data of an outer step, a pure function of its index."""
        return None

    @abstractmethod
    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the scalar outer loss at the last params."""

    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        """Returns a term `E_t` added to the outer loss at the params after inner step `index`; none unless overridden.

        The outer objective is then `sum_t E_t(s_t) + E(s_T)`.
        """
        # Called by nobody unless a subclass has it, as `has_step_loss` tells: most runs have no term to add.
        raise TypeError("this outer problem has no terms at inner steps")

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns scalar figures to report, such as an accuracy; they are not differentiated."""
        return {}

    @property
    def has_step_loss(self) -> bool:
        """Whether the problem adds terms at inner steps."""
        return type(self).step_loss is not OuterProblem.step_loss


class ProblemSource(ABC):
    """Where the outer loop gets its problems: one per outer step, all with the same outer variables."""

    @abstractmethod
    def init_hparams(self) -> TensorDict:
        """Returns the outer variables before the first outer step."""

    @abstractmethod
    def at(self, outer_step: int) -> BilevelProblem:
        """Returns the problem of an outer step, a pure function of its index."""


class Problems(ProblemSource):
    """The problems that a function of the outer step returns: new data, another seed or a longer horizon each step.

        source = ht.Problems(lambda outer_step: ht.BilevelProblem(inner, outer, ..., seed=outer_step))

    The outer variables are those of the problem of step 0.

    Args:
        make: from the outer step to its problem, a pure function.

    Raises:
        TypeError: if `make` is no function, or (from `at`) returns no `BilevelProblem`.
    """

    def __init__(self, make: Callable[[int], BilevelProblem]) -> None:
        if not callable(make):
            raise TypeError(
                f"`make` is a {type(make).__name__}, not a function of the outer step. Pass one, such as "
                "`lambda outer_step: ht.BilevelProblem(...)`; a single problem is its own source."
            )
        self._make = make

    def init_hparams(self) -> TensorDict:
        """Returns the outer variables of the problem of step 0."""
        return self.at(0).init_hparams()

    def at(self, outer_step: int) -> BilevelProblem:
        """Returns the problem of an outer step."""
        problem = self._make(outer_step)
        if not isinstance(problem, BilevelProblem):
            raise TypeError(
                f"`make({outer_step})` returned a {type(problem).__name__}, not a `BilevelProblem`: the outer loop "
                "differentiates through one at every step. Return one."
            )
        return problem


# No equality of fields: two problems are the same only where they are one
# object, and what is known of a kind of problem is kept by `kind_of`.
@dataclass(frozen=True, eq=False)
class BilevelProblem(ProblemSource):
    """Minimise `E(w_T(hparams), hparams)`, where `w_T` comes from `num_steps` steps of `dynamics` on the inner loss.

    Args:
        inner: the inner problem.
        outer: the outer problem.
        dynamics: the inner optimiser.
        num_steps: the horizon (unit: steps). 0 is legal: a closed form in `init_params` is differentiated through.
        num_tasks: None for one inner problem; else every tensor of the batches has a leading `tasks` axis of this
            length, each task has params of its own, all share hparams, and the outer loss is the mean over tasks.
        context: computed once before the inner loop; its entries are read like hparams by `init_params` and the
            losses, and may be integers. A `Hyper` reads them too, so that each task can have settings of its own. With
            tasks, each entry has a leading tasks axis, and row `i` must depend on row `i` of the outer batch only,
            since tasks may be run in chunks.
        shared_context: names of context entries without a tasks axis.
        allow_unused: names of hparams that may have no path to the outer loss, or none that the backend follows; they
            get zeros.
        warm_start: start each outer step from the inner state that the last one ended with, instead of
            `init_params`; schedules over the horizon are refused.
        seed: of the noise that the model draws in its losses (dropout) or in `init_params`.

    Raises:
        ValueError: if a number is out of range or options contradict each other.
        TypeError: if a part is of the wrong kind.
    """

    inner: InnerProblem
    outer: OuterProblem
    _: KW_ONLY
    dynamics: Dynamics
    num_steps: int
    num_tasks: int | None = None
    context: Context | None = None
    shared_context: tuple[str, ...] = ()
    allow_unused: tuple[str, ...] = ()
    warm_start: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_kind("inner", self.inner, InnerProblem)
        _check_kind("outer", self.outer, OuterProblem)
        _check_kind("dynamics", self.dynamics, Dynamics)
        # To Python True is the number 1, and would run one step.
        if not is_count(self.num_steps, least=0):
            raise ValueError(
                f"`num_steps` is {self.num_steps!r}: the inner loop takes a whole number of steps, at least 0. Pass 0 "
                "only for a closed form in `init_params`."
            )
        if self.num_tasks is not None and not is_count(self.num_tasks):
            raise ValueError(
                f"`num_tasks` is {self.num_tasks!r}: a batch holds at least one task. Pass None for a single problem "
                "whose tensors have no tasks axis."
            )
        if not isinstance(self.warm_start, bool):
            raise TypeError(f"`warm_start` is {self.warm_start!r}, which is neither True nor False. Pass one of them.")
        for name in ("allow_unused", "shared_context"):
            names = getattr(self, name)
            # A text is a sequence of texts too, its letters.
            if isinstance(names, str) or not isinstance(names, Sequence) or not set(map(type, names)) <= {str}:
                raise TypeError(f"`{name}` is {names!r}, but it lists names. Pass a tuple of them, such as `('lr',)`.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            check_seed(self.seed)
        if self.context is not None and not callable(self.context):
            raise TypeError(
                f"`context` is {self.context!r}, a {type(self.context).__name__}: it is called with the outer "
                "variables and the outer batch. Pass a function, or None for no context."
            )
        for name, setting in self.dynamics.settings().items():
            self._check_schedule(name, setting)

    def _check_schedule(self, name: str, setting: Setting) -> None:
        # An entry of a schedule belongs to a step of the horizon; a run that goes on counts its steps past it.
        if self.warm_start and is_schedule(setting):
            raise ValueError(
                f"`{name}` of the dynamics is a schedule over the horizon, but `warm_start` is True: a warm-started "
                "run goes on from step to step and has no horizon. Use one value, or `warm_start=False`."
            )

    def init_hparams(self) -> TensorDict:
        """Returns the outer variables of the outer problem and of the dynamics.

        Raises:
            ValueError: if both declare the same name.
        """
        # A rule that learns a setting (`Hyper`) declares its first value
        # itself, so that it need not be written twice.
        declared, owned = self.outer.init_hparams(), self.dynamics.init_hparams()
        if not isinstance(declared, dict):
            raise TypeError(
                f"`OuterProblem.init_hparams` returned a {type(declared).__name__}: the outer variables are a flat "
                "dict from names to tensors. Return one, such as `{'lr': torch.tensor(0.1)}`."
            )
        clash = sorted(declared.keys() & owned.keys())
        if clash:
            raise ValueError(
                f"`init_hparams` of the outer problem and of the dynamics both return {clash}: one value cannot serve "
                "both. Rename one of them."
            )
        # This order is that of the variables everywhere: forward mode counts their entries through it.
        return {**declared, **owned}

    def at(self, outer_step: int) -> BilevelProblem:
        """Returns itself: the same problem at every outer step."""
        return self

    def constraints(self) -> Mapping[str, Constraint]:
        """Returns the natural constraints of learnt settings of the dynamics, by name or pattern."""
        return self.dynamics.constraints()


def _check_kind(argument: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"`{argument}` is a {type(value).__name__}, not a `{kind.__name__}`: the library calls the methods of that "
            f"interface. Pass an instance of a subclass of `{kind.__name__}`."
        )
