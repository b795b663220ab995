"""How a dynamics declares a setting: its range, what keeps it there while it is learnt, and whether it can be learnt.

Everything else reads the declaration: the check when a dynamics is made, `settings()`, `constraints()` and the check
against the params of a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hypertorch.checks.values import is_number
from hypertorch.constraints import Box, Constraint, Positive
from hypertorch.dynamics.settings import (
    Hyper,
    Setting,
    UngroupedSetting,
    belonging,
    check_patterns,
    is_schedule,
    parts,
)
from hypertorch.types import TensorMapping


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, and the constraint that keeps a learnt one among them.

    Args:
        lower: least number allowed.
        upper: greatest number allowed.
        natural: the constraint of an outer variable that is read as the setting, without a transform. It may be
            narrower than the range: a learnt step size stays above 0. None for no constraint.
        reason: the last sentence of the message for a number outside: what the setting means, or what to use.
        infinite: whether infinity is allowed, which stands for no bound; else numbers are finite.
    """

    lower: float
    upper: float
    natural: Positive | Box | None
    reason: str
    infinite: bool = dataclasses.field(default=False, kw_only=True)

    def includes(self, values: Tensor) -> Tensor:
        """Returns which of the values are allowed; NaN never is."""
        inside = (values >= self.lower) & (values <= self.upper)
        return inside if self.infinite else inside & values.isfinite()


# The greatest number below the open end 1: a range is then two comparisons. At 1 the bias corrections divide by 0.
_BELOW_ONE = math.nextafter(1.0, 0.0)
# A learnt factor stays this far from 1: closer, a running mean learns nothing in the horizon of any inner loop, and
# `1 / (1 - factor)` in the bias corrections loses all digits in single precision.
_MARGIN = 1e-6
NON_NEGATIVE = Box(lower=0.0)
PROPORTION = Box(lower=0.0, upper=1.0)
DECAY = Box(lower=0.0, upper=1.0 - _MARGIN)

# What several rules mean by the same word. A step size of 0 freezes a part of the params on purpose; a learnt one is
# kept above 0.
STEP_SIZE = Range(0.0, math.inf, Positive(), "A step size is positive.")
STEP_SIZE_EITHER_WAY = dataclasses.replace(STEP_SIZE, reason="A step size is positive; to ascend, pass maximize=True.")
WEIGHT_DECAY = Range(0.0, math.inf, NON_NEGATIVE, "A negative one makes the weights explode.")
EPS = Range(0.0, math.inf, NON_NEGATIVE, "It keeps the denominator away from 0.")
# 1 is allowed as a number: the buffer then sums all gradients, while a mean with its `1 - momentum` would see none.
MOMENTUM = Range(0.0, 1.0, DECAY, "At 1 the buffer never forgets; 0.9 is usual.")
MEAN_DECAY = Range(0.0, _BELOW_ONE, DECAY, "At 1 the mean never learns of a gradient.")
SQUARE_DECAY = Range(0.0, _BELOW_ONE, DECAY, "At 1 the mean square never learns of a gradient.")


@dataclass(frozen=True, kw_only=True)
class _Declaration:
    """The declaration of a setting, as `setting` received it."""

    allowed: Range
    never_learnt: str | None
    read_once: bool
    optional: bool


def setting(
    allowed: Range, default: Any = dataclasses.MISSING, *, never_learnt: str | None = None, read_once: bool = False
) -> Any:
    """Returns the dataclass field of a setting of a dynamics.

    Example: `share: Setting = setting(Range(0.0, 1.0, Box(lower=0.0, upper=1.0), "It is a share."), 0.5)`.

    Args:
        allowed: the numbers that it may be.
        default: the default; a field without one must be given. With None the setting can be left out.
        never_learnt: None, or why the hypergradient of the setting is zero by nature, so that a `Hyper` is refused.
        read_once: whether the setting is read once, before the first step, so that a schedule is refused.
    """
    declaration = _Declaration(
        allowed=allowed, never_learnt=never_learnt, read_once=read_once, optional=default is None
    )
    return dataclasses.field(default=default, metadata={_Declaration: declaration})


@cache
def declared(kind: type) -> dict[str, _Declaration]:
    """Returns the declarations of a class of dynamics, by the name of the setting, in order."""
    if not dataclasses.is_dataclass(kind):
        return {}
    return {
        field.name: field.metadata[_Declaration] for field in dataclasses.fields(kind) if _Declaration in field.metadata
    }


def check_declared(owner: str, settings: Mapping[str, Setting], declarations: Mapping[str, _Declaration]) -> None:
    """Raises unless settings are what their declarations allow; called when a dynamics is made.

    Args:
        owner: the dynamics' name, for the message.
        settings: the settings by name.
        declarations: their declarations.

    Raises:
        ValueError: if a number is out of range, or a setting is learnt or scheduled that cannot be.
        TypeError: if a setting is of no known kind.
    """
    for name, value in settings.items():
        declaration = declarations[name]
        check_range(owner, name, value, declaration.allowed)
        if declaration.never_learnt is not None and any(isinstance(part, Hyper) for part in parts(value)):
            raise ValueError(
                f"`{name}` of `{owner}` is {value!r}, but its hypergradient is exactly zero: "
                f"{declaration.never_learnt}. Give it as a number or a schedule, and compare runs to choose among "
                "several."
            )
        if declaration.read_once and is_schedule(value):
            raise ValueError(
                f"`{name}` of `{owner}` is {value!r}, a schedule over steps: it is read once, before the first one. "
                "Give one value, or `Hyper(name)` to learn one."
            )


def check_range(owner: str, name: str, setting: Setting, allowed: Range) -> None:
    """Raises unless a setting is of a known kind and its numbers lie in a range.

    Args:
        owner: the dynamics' name, for the message.
        name: the setting's name.
        setting: the setting; the value of a `Hyper` is not known yet, and not looked at.
        allowed: the numbers allowed.

    Raises:
        ValueError: if a number, or an entry of a schedule, tensor or group, is out of range, or a group is empty.
        TypeError: if the setting is of another kind.
    """
    if not isinstance(setting, Mapping):
        _check_range(f"`{name}` of `{owner}`", setting, allowed)
        return
    if not setting:
        raise ValueError(
            f"`{name}` of `{owner}` is an empty mapping: no parameter would have a value. Give it entries such as "
            "{'head.*': 0.1, '*': 0.01}, or pass one number for all."
        )
    for pattern, own in setting.items():
        _check_range(f"`{name}[{pattern!r}]` of `{owner}`", own, allowed)


def _check_range(argument: str, setting: UngroupedSetting, allowed: Range) -> None:
    if isinstance(setting, Hyper):
        return
    if isinstance(setting, (bool, str, bytes)) or not isinstance(setting, (int, float, Sequence, Tensor)):
        raise TypeError(
            f"{argument} is {setting!r}, which is neither a number, a sequence of numbers, a tensor nor a `Hyper`. "
            "To learn a setting, pass `ht.Hyper(name)` and put its tensor into the outer variables."
        )
    if isinstance(setting, Tensor):
        # Checked before the values are read, because reading waits for the device.
        _check_constant(argument, setting)
        outside = setting[~allowed.includes(setting)]
        values = outside[:1].tolist()
    else:
        values = setting if isinstance(setting, Sequence) else (setting,)
    for value in values:
        if not is_number(value):
            raise TypeError(
                f"{argument} holds {value!r}, a `{type(value).__name__}`: a schedule is of numbers, one for each inner "
                "step. Convert it, for example by `float`."
            )
        # Negated, so that NaN is outside: every comparison with it is false.
        if not allowed.lower <= value <= allowed.upper or (math.isinf(value) and not allowed.infinite):
            raise ValueError(f"{argument} is {value}, outside [{allowed.lower}, {allowed.upper}]. {allowed.reason}")


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


def natural_constraints(
    settings: Mapping[str, Setting], natural: Mapping[str, Positive | Box | None]
) -> dict[str, Constraint]:
    """Returns the constraints of all settings that are learnt directly, by name or pattern of the outer variable.

    A setting learnt through a `transform` has no constraint: the transform keeps it in range.

    Args:
        settings: the settings by name, groups included.
        natural: the constraint of each, by the same names; a setting without one is free.
    """
    return intersections(
        {part.pattern: constraint}
        for name, setting in settings.items()
        if (constraint := natural.get(name)) is not None
        for part in parts(setting)
        # The constraint is on the outer variable, and through a transform that is not the setting: a log step size is
        # negative.
        if isinstance(part, Hyper) and part.transform is None
    )


def intersections(constraints: Iterable[Mapping[str, Constraint]]) -> dict[str, Constraint]:
    """Returns one constraint for each name; an outer variable that serves several settings is kept in all ranges.

    Raises:
        ValueError: if two constraints of one name differ and are no ranges, or have no number in common.
    """
    result: dict[str, Constraint] = {}
    for own in constraints:
        for name, constraint in own.items():
            known = result.get(name, constraint)
            # Equal constraints are not intersected, so that a kind without bounds can be shared too.
            result[name] = known if known == constraint else _intersection(name, known, constraint)
    return result


def _intersection(name: str, first: Constraint, second: Constraint) -> Constraint:
    bounds = [_bounds(constraint) for constraint in (first, second)]
    known = [pair for pair in bounds if pair is not None]
    if len(known) == 2:
        lower, upper = max(pair[0] for pair in known), min(pair[1] for pair in known)
        if lower <= upper:
            return Box(lower=lower, upper=upper)
    raise ValueError(
        f"the outer variable `{name}` has two constraints, {first} and {second}, with nothing in common that the "
        "library can find. Let two settings read two variables."
    )


def _bounds(constraint: Constraint) -> tuple[float, float] | None:
    if isinstance(constraint, Positive):
        return constraint.minimum, math.inf
    return (constraint.lower, constraint.upper) if isinstance(constraint, Box) else None


def check_settings(
    owner: str, settings: Mapping[str, Setting], params: TensorMapping, hparams: TensorMapping, num_steps: int
) -> None:
    """Raises if a learnt setting has no entry in `hparams`, or a setting does not fit the params or the horizon.

    Args:
        owner: the dynamics' name, for the message.
        settings: the settings by name.
        params: the trained inner parameters of one task, for their names, shapes and dtypes.
        hparams: the outer variables.
        num_steps: the horizon (unit: steps).

    Raises:
        ValueError: naming the setting, and the entry or the parameter.
    """
    for name, setting in settings.items():
        # A number fits any param and horizon; its range was checked when the dynamics was made.
        if isinstance(setting, (int, float)):
            continue
        if not isinstance(setting, Mapping):
            _check_setting(f"`{name}` of `{owner}`", setting, params, hparams, num_steps)
        # Each part of a group against its own params: a `Hyper` per parameter needs entries for these alone.
        elif params:
            check_patterns(f"`{name}` of `{owner}`", setting, params)
            for pattern, own in setting.items():
                members = {parameter: params[parameter] for parameter in belonging(setting, pattern, params)}
                _check_setting(f"`{name}[{pattern!r}]` of `{owner}`", own, members, hparams, num_steps)


def _check_setting(
    argument: str, setting: UngroupedSetting, params: TensorMapping, hparams: TensorMapping, num_steps: int
) -> None:
    if isinstance(setting, Hyper) and setting.per_parameter:
        for parameter, param in params.items():
            _check_entry(argument, setting, setting.entry_name(parameter), hparams, num_steps)
            entry = hparams[setting.entry_name(parameter)]
            # The axis of steps is taken off at each step, before the value meets the parameter.
            shape = entry.shape[1:] if setting.per_step else entry.shape
            _check_shape(f"`{setting.entry_name(parameter)}`, read by {argument},", shape, parameter, param)
            # Elementwise, a transform keeps the shape, but it may change the dtype.
            if setting.transform is None:
                _check_dtype(argument, entry, len(shape), parameter, param)
    elif isinstance(setting, Hyper):
        _check_entry(argument, setting, setting.name, hparams, num_steps)
    elif isinstance(setting, Tensor):
        for parameter, param in params.items():
            _check_shape(argument, setting.shape, parameter, param)
            _check_dtype(argument, setting, setting.dim(), parameter, param)
    elif isinstance(setting, Sequence) and len(setting) != num_steps:
        raise ValueError(
            f"{argument} is a schedule of {len(setting)} values, but the problem has `num_steps` = {num_steps}: every "
            f"step needs one. Give {num_steps} values, or one number for all."
        )


def _check_entry(argument: str, setting: Hyper, entry: str, hparams: TensorMapping, num_steps: int) -> None:
    if entry not in hparams:
        raise ValueError(
            f"{argument} reads the outer variable `{entry}`, which is not among {sorted(hparams)}. "
            "Return it from `init_hparams`, or give the setting as a number."
        )
    value = hparams[entry]
    if setting.per_step and (value.dim() == 0 or value.shape[0] != num_steps):
        raise ValueError(
            f"`{entry}` has shape {tuple(value.shape)}, but {argument} reads it as a schedule over "
            f"`num_steps` = {num_steps}. Its first axis must have one entry per step."
        )
    # An entry with more axes passes the test above, and would be read as a row of values at each step.
    if setting.per == "step" and value.numel() != num_steps:
        raise ValueError(
            f"`{entry}` has shape {tuple(value.shape)}, but {argument} reads it as one value per step. Pass "
            "`per='step,parameter'` for a schedule of every weight."
        )
    if setting.per == "one" and value.numel() != 1:
        raise ValueError(
            f"`{entry}` has shape {tuple(value.shape)}, but {argument} reads it as one value. Pass "
            "`per='step'` for a schedule, or `per='parameter'` for a value per weight."
        )


def _check_shape(argument: str, shape: torch.Size, parameter: str, param: Tensor) -> None:
    """Raises unless a tensor of this shape multiplies the parameter without changing its shape."""
    # Aligned from the right, as broadcasting does it: a tasks axis in front of the params then changes nothing.
    padded = (1,) * (param.dim() - len(shape)) + tuple(shape)
    if len(shape) > param.dim() or any(own not in (1, size) for own, size in zip(padded, param.shape, strict=True)):
        raise ValueError(
            f"{argument} has shape {tuple(shape)}, which does not broadcast against the inner parameter `{parameter}` "
            f"of shape {tuple(param.shape)}. Give it that shape, or one axis of size 1 for all entries along it; a "
            "mapping from names of parameters gives each its own tensor."
        )


def _check_dtype(argument: str, value: Tensor, dim: int, parameter: str, param: Tensor) -> None:
    """Raises if a tensor with this many axes would promote the parameter to another dtype."""
    # A tensor without axes does not promote one of the same kind that has some.
    if dim and torch.promote_types(value.dtype, param.dtype) != param.dtype:
        raise ValueError(
            f"{argument} is read from a tensor of dtype {value.dtype}, but the inner parameter `{parameter}` has "
            f"{param.dtype}: a step would change the parameter's dtype. Convert the tensor with `.to({param.dtype})`."
        )
