"""What a setting of a dynamics may be: a number, a schedule, a tensor, an outer variable, or a group of these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from hypertorch.checks.argument_types import check_fields
from hypertorch.types import TensorMapping

Per: TypeAlias = Literal["one", "step", "parameter", "step,parameter"]
"""What an outer variable holds of a setting: one value, one per inner step, one per inner parameter, or both."""

PER: tuple[Per, ...] = get_args(Per)


@dataclass(frozen=True)
class Hyper:
    """A setting that is read from the outer variables, and so has a hypergradient.

    Example: `SGD(lr=Hyper("log_lr", torch.exp))` learns the logarithm of one step size;
    `SGD(lr=Hyper("lr", per="parameter"))` learns a step size for every weight (Meta-SGD).

    Args:
        name: the entry of `hparams`, or of the problem's context, to read; with a `"parameter"` in `per`, the entries
            `f"{name}.{parameter}"`.
        transform: maps the entry to the value of the setting, elementwise; None leaves it as it is.
        per: what the entry holds: `"one"`, one value (shape `()`); `"step"`, a schedule (shape `(num_steps,)`);
            `"parameter"`, a tensor that broadcasts against the parameter; `"step,parameter"`, the same with a leading
            axis of `num_steps`.

    Raises:
        ValueError: if `per` is none of these.

    References:
        Maclaurin, Duvenaud and Adams (2015), section 3 (schedules); Li et al. (2017), Meta-SGD (per parameter).
    """

    name: str
    transform: Callable[[Tensor], Tensor] | None = None
    per: Per = "one"

    def __post_init__(self) -> None:
        check_fields(self, "name", "transform")
        if self.per not in PER:
            raise ValueError(
                f"`per` of `Hyper({self.name!r})` is {self.per!r}, which names no way to read an outer variable. Use "
                "'one', 'step', 'parameter' or 'step,parameter'."
            )

    # Cached: both are asked at every inner step.

    @cached_property
    def per_step(self) -> bool:
        """Whether the entry holds a schedule over the horizon."""
        return "step" in self.per

    @cached_property
    def per_parameter(self) -> bool:
        """Whether there is an entry for every inner parameter."""
        return "parameter" in self.per

    @property
    def pattern(self) -> str:
        """The name of the entry, or a pattern that matches the names of all entries."""
        return f"{self.name}.*" if self.per_parameter else self.name

    def entry_name(self, parameter: str) -> str:
        """Returns the name of the entry of `hparams` that is read for an inner parameter."""
        return f"{self.name}.{parameter}" if self.per_parameter else self.name

    def value(self, hparams: TensorMapping, parameter: str, index: int) -> Tensor:
        """Returns the setting's value at a step, for a parameter."""
        entry = hparams[f"{self.name}.{parameter}" if self.per_parameter else self.name]
        if self.per_step:
            # Inside a compiled loop the index is a tensor, in double precision.
            at_tensor = isinstance(index, Tensor)
            entry = entry.index_select(0, index.long().reshape(1))[0] if at_tensor else entry[index]
        return entry if self.transform is None else self.transform(entry)


UngroupedSetting: TypeAlias = float | Sequence[float] | Tensor | Hyper
"""A number; a schedule with one number per inner step; a constant tensor, of one value or of a shape that broadcasts
against every parameter; or an outer variable."""

Setting: TypeAlias = UngroupedSetting | Mapping[str, UngroupedSetting]
"""One of these, or a group of them for parts of the params: from names or patterns of parameters to settings.

Patterns are those of file names, as in `{"head.*": 0.1, "*": Hyper("body_lr")}`. A name wins over a pattern, an earlier
pattern over a later one; every parameter must belong to one.
"""


def resolve(setting: Setting, hparams: TensorMapping, parameter: str, index: int) -> float | Tensor:
    """Returns the value of a setting at a step, for one parameter: a float stays a float.

    Args:
        setting: the setting.
        hparams: the outer variables.
        parameter: the name of an inner parameter.
        index: the step (unit: steps, from 0).
    """
    if isinstance(setting, (float, int)):
        return setting
    if isinstance(setting, Hyper):
        return setting.value(hparams, parameter, index)
    if isinstance(setting, Tensor):
        return setting
    if isinstance(setting, Mapping):
        return resolve(own_setting(setting, parameter), hparams, parameter, index)
    return setting[index]


def own_setting(setting: Setting, parameter: str) -> UngroupedSetting:
    """Returns the entry of a group that a parameter belongs to, or the setting itself if it is no group."""
    if not isinstance(setting, Mapping):
        return setting
    # As a tuple, since keys of the cache are hashed.
    pattern = first_match(tuple(setting), parameter)
    if pattern is None:
        raise KeyError(f"no entry of {list(setting)} matches the inner parameter `{parameter}`")
    return setting[pattern]


def parts(setting: Setting) -> Iterator[UngroupedSetting]:
    """Yields the settings of a group, or the setting itself."""
    if isinstance(setting, Mapping):
        yield from setting.values()
    else:
        yield setting


def is_active(setting: Setting) -> bool:
    """Returns whether a setting can differ from zero at any step, so that its term must be computed.

    A tensor always can: a look at its values would wait for an accelerator.
    """
    return any(_is_active(part) for part in parts(setting))


def _is_active(setting: UngroupedSetting) -> bool:
    if isinstance(setting, (float, int)):
        return setting != 0.0
    if isinstance(setting, (Hyper, Tensor)):
        return True
    return any(value != 0.0 for value in setting)


def is_schedule(setting: Setting) -> bool:
    """Returns whether a setting, or a part of it, has a value of its own for every step of the horizon."""
    return any(part.per_step if isinstance(part, Hyper) else isinstance(part, Sequence) for part in parts(setting))


def first_match(patterns: tuple[str, ...], parameter: str) -> str | None:
    """Returns the pattern that a parameter belongs to: its own name, else the first that matches; None if none does.

    Args:
        patterns: names or patterns (`*`, `?`, `[...]`, as in file names).
        parameter: the name of an inner parameter.
    """
    # A function of its own: PyTorch's compiler is told that its result is a constant, and looks through a cache.
    return _first_match(patterns, parameter)


# A step asks for the same names again and again, and matching a pattern takes longer than a small update.
@lru_cache(maxsize=4096)
def _first_match(patterns: tuple[str, ...], parameter: str) -> str | None:
    if parameter in patterns:
        return parameter
    # `fnmatch` would ignore case on some systems, and parameters that differ in case alone are two.
    return next((pattern for pattern in patterns if fnmatchcase(parameter, pattern)), None)


def belonging(patterns: Iterable[str], pattern: str, parameters: Iterable[str]) -> list[str]:
    """Returns the parameters, in their order, that belong to one of the patterns."""
    patterns = tuple(patterns)
    return [parameter for parameter in parameters if first_match(patterns, parameter) == pattern]


def check_patterns(argument: str, patterns: Collection[str], parameters: Collection[str]) -> None:
    """Raises unless every parameter belongs to a pattern, and every pattern has a parameter.

    A "*" without a parameter of its own is no mistake: it says what holds for all others.

    Args:
        argument: how the message calls the mapping, backticks included.
        patterns: its keys, in order.
        parameters: names of the inner parameters.

    Raises:
        ValueError: naming the parameter or the pattern.
    """
    known = sorted(parameters)
    for parameter in parameters:
        if first_match(tuple(patterns), parameter) is None:
            raise ValueError(
                f"{argument} has the entries {list(patterns)}, none of which matches the inner parameter "
                f"`{parameter}`: it would have no value. Add an entry for it, or a last one '*' for all others."
            )
    for pattern in patterns:
        if all(first_match((pattern,), parameter) is None for parameter in parameters):
            raise ValueError(
                f"{argument} has the entry {pattern!r}, which matches none of the inner parameters {known}: it would "
                "do nothing. Use one of these names, or a pattern that matches some."
            )
        # An entry may match and yet never be used, because earlier ones take all that it matches.
        if pattern != "*" and not belonging(patterns, pattern, parameters):
            raise ValueError(
                f"{argument} has the entry {pattern!r}, but every inner parameter it matches belongs to another entry "
                f"of {list(patterns)}: it would do nothing. A name wins over a pattern, and an earlier pattern over a "
                "later one: put it first, or drop it."
            )
