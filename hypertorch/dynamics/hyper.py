"""Settings of a dynamics: plain numbers, schedules, tensors, outer variables to be learnt, or groups of these."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from hypertorch.dynamics.patterns import first_match
from hypertorch.types import TensorMapping

Per: TypeAlias = Literal["step", "parameter", "step,parameter"]


@dataclass(frozen=True)
class Hyper:
    """A setting that is read from the outer variables, and so has a hypergradient.

    Example: `SGD(lr=Hyper("log_lr", torch.exp))` learns the logarithm of one step size;
    `SGD(lr=Hyper("lr", per="parameter"))` learns a step size for every weight (Meta-SGD).

    Args:
        name: the entry of `hparams` to read; with a `"parameter"` in `per`, the entries `f"{name}.{parameter}"`.
        transform: maps the entry to the value of the setting, elementwise; None leaves it as it is.
        per: what the entry holds: None, one value (shape `()`); `"step"`, a schedule (shape `(num_steps,)`);
            `"parameter"`, a tensor that broadcasts against the parameter; `"step,parameter"`, the same with a leading
            axis of `num_steps`.

    Raises:
        ValueError: if `per` is none of these.

    References:
        Maclaurin, Duvenaud and Adams (2015), section 3 (schedules); Li et al. (2017), Meta-SGD (per parameter).
    """

    name: str
    transform: Callable[[Tensor], Tensor] | None = None
    per: Per | None = None

    def __post_init__(self) -> None:
        if self.per not in (None, "step", "parameter", "step,parameter"):
            raise ValueError(
                f"`per` of `Hyper({self.name!r})` is {self.per!r}, which names no way to read an outer variable. Use "
                "None (one value), 'step', 'parameter' or 'step,parameter'."
            )

    @property
    def per_step(self) -> bool:
        """Whether the entry holds a schedule over the horizon."""
        return self.per in ("step", "step,parameter")

    @property
    def per_parameter(self) -> bool:
        """Whether there is an entry for every inner parameter."""
        return self.per in ("parameter", "step,parameter")

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
            entry = entry[index]
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
    """Returns the value of a setting at a step, for a parameter: a float stays a float."""
    if isinstance(setting, (float, int)):
        return setting
    if isinstance(setting, Hyper):
        return setting.value(hparams, parameter, index)
    if isinstance(setting, Tensor):
        return setting
    if isinstance(setting, Mapping):
        return resolve(own_setting(setting, parameter), hparams, parameter, index)
    return setting[index]


def own_setting(group: Mapping[str, UngroupedSetting], parameter: str) -> UngroupedSetting:
    """Returns the entry of a group that a parameter belongs to."""
    pattern = first_match(tuple(group), parameter)
    if pattern is None:
        raise KeyError(f"no entry of {list(group)} matches the inner parameter `{parameter}`")
    return group[pattern]


def parts(setting: Setting) -> Iterator[UngroupedSetting]:
    """Yields the settings of a group, or the setting itself."""
    if isinstance(setting, Mapping):
        yield from setting.values()
    else:
        yield setting


def one_for_all(setting: Setting, parameter: str, hparams: TensorMapping) -> Hashable:
    """Returns what tells whether another parameter has the same setting; None if this value is for one parameter alone.

    That is a value of its own by the parameter's name, or a tensor of several values.
    """
    own = own_setting(setting, parameter) if isinstance(setting, Mapping) else setting
    if isinstance(own, Hyper) and own.per_parameter:
        return None
    value = resolve(own, hparams, parameter, 0)
    return None if isinstance(value, Tensor) and value.dim() else id(own)


def is_active(setting: Setting) -> bool:
    """Returns whether a setting can differ from zero at any step, so that its term must be computed.

    A tensor always can: looking at its values would wait for an accelerator.
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


def check_range(owner: str, name: str, setting: Setting, lower: float, upper: float, advice: str) -> None:
    """Raises unless a setting is of a known kind and its numbers lie in `[lower, upper]`.

    Args:
        owner: the dynamics' name, for the message.
        name: the setting's name.
        setting: the setting; what a `Hyper` reads is not known yet, and not looked at.
        lower: least number allowed.
        upper: greatest number allowed.
        advice: the last sentence of the message.

    Raises:
        ValueError: if a number, or an entry of a schedule, tensor or group, is out of range, or a group is empty.
        TypeError: if the setting is of another kind.
    """
    if not isinstance(setting, Mapping):
        _check_range(f"`{name}` of `{owner}`", setting, lower, upper, advice)
        return
    if not setting:
        raise ValueError(
            f"`{name}` of `{owner}` is an empty mapping: no parameter would have a value. Give it entries such as "
            "{'head.*': 0.1, '*': 0.01}, or pass one number for all."
        )
    for pattern, own in setting.items():
        _check_range(f"`{name}[{pattern!r}]` of `{owner}`", own, lower, upper, advice)


def check_not_learnt(owner: str, name: str, setting: Setting, reason: str) -> None:
    """Raises `ValueError` if a setting whose hypergradient is zero by nature is to be learnt.

    Args:
        owner: the dynamics' name, for the message.
        name: the setting's name.
        setting: the setting.
        reason: the middle of the message: why nothing depends smoothly on the setting.
    """
    if any(isinstance(part, Hyper) for part in parts(setting)):
        raise ValueError(
            f"`{name}` of `{owner}` is {setting!r}, but its hypergradient is exactly zero: {reason}. Give it as a "
            "number or a schedule, and compare runs to choose among several."
        )


def _check_range(argument: str, setting: UngroupedSetting, lower: float, upper: float, advice: str) -> None:
    if isinstance(setting, Hyper):
        return
    if isinstance(setting, str) or not isinstance(setting, (int, float, Sequence, Tensor)):
        raise TypeError(
            f"{argument} is {setting!r}, which is neither a number, a sequence of numbers, a tensor nor a `Hyper`. "
            "To learn a setting, pass `ht.Hyper(name)` and put its tensor into the outer variables."
        )
    if isinstance(setting, Tensor):
        _check_constant(argument, setting)
        outside = setting[~((setting >= lower) & (setting <= upper))]
        values = outside[:1].tolist()
    else:
        values = setting if isinstance(setting, Sequence) else (setting,)
    for value in values:
        if not lower <= value <= upper:
            raise ValueError(f"{argument} is {value}, outside [{lower}, {upper}]. {advice}")


def _check_constant(argument: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(
            f"{argument} is a tensor of dtype {tensor.dtype}: settings are real numbers. Convert it with `.float()` or "
            "`.double()`, to the dtype of the params."
        )
    if tensor.requires_grad:
        raise ValueError(
            f"{argument} is a tensor that requires grad, but a tensor is a constant here: nothing would be learnt. "
            "Pass `ht.Hyper(name)` and put the tensor into the outer variables, or pass `tensor.detach()`."
        )
