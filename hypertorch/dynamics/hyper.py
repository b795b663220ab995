"""Settings of a dynamics: plain numbers, schedules, or outer variables to be learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

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

    def entry_names(self, parameters: Sequence[str]) -> list[str]:
        """Returns the names of the entries of `hparams` that are read, given the names of the inner parameters."""
        return [f"{self.name}.{parameter}" for parameter in parameters] if self.per_parameter else [self.name]

    def value(self, hparams: TensorMapping, parameter: str, index: int) -> Tensor:
        """Returns the setting's value at a step, for a parameter."""
        entry = hparams[f"{self.name}.{parameter}" if self.per_parameter else self.name]
        if self.per_step:
            entry = entry[index]
        return entry if self.transform is None else self.transform(entry)


Setting: TypeAlias = float | Sequence[float] | Hyper
"""A number, a schedule with one number per inner step, or an outer variable."""


def resolve(setting: Setting, hparams: TensorMapping, parameter: str, index: int) -> float | Tensor:
    """Returns the value of a setting at a step, for a parameter: a float stays a float."""
    if isinstance(setting, Hyper):
        return setting.value(hparams, parameter, index)
    if isinstance(setting, Sequence):
        return setting[index]
    return setting


def is_active(setting: Setting) -> bool:
    """Returns whether a setting can differ from zero at any step, so that its term must be computed."""
    if isinstance(setting, Hyper):
        return True
    if isinstance(setting, Sequence):
        return any(value != 0.0 for value in setting)
    return setting != 0.0


def check_range(owner: str, name: str, setting: Setting, lower: float, upper: float, advice: str) -> None:
    """Raises `ValueError` if a number, or an entry of a schedule, lies outside `[lower, upper]`."""
    if isinstance(setting, Hyper):
        return
    if isinstance(setting, str) or not isinstance(setting, (int, float, Sequence)):
        raise TypeError(
            f"`{name}` of `{owner}` is {setting!r}, which is neither a number, a sequence of numbers nor a `Hyper`. "
            "To learn a setting, pass `ht.Hyper(name)` and put its tensor into the outer variables."
        )
    values = setting if isinstance(setting, Sequence) else (setting,)
    for value in values:
        if not lower <= value <= upper:
            raise ValueError(f"`{name}` of `{owner}` is {value}, outside [{lower}, {upper}]. {advice}")


def check_settings(
    owner: str, settings: Mapping[str, Setting], parameters: Sequence[str], hparams: TensorMapping, num_steps: int
) -> None:
    """Raises `ValueError` if a learnt setting has no entry in `hparams`, or a schedule has another length.

    Args:
        owner: the dynamics' name, for the message.
        settings: the settings by name.
        parameters: names of the trained inner parameters.
        hparams: the outer variables.
        num_steps: the horizon (unit: steps).
    """
    for name, setting in settings.items():
        if isinstance(setting, Hyper):
            for entry in setting.entry_names(parameters):
                _check_entry(owner, name, setting, entry, hparams, num_steps)
        elif isinstance(setting, Sequence) and not isinstance(setting, str) and len(setting) != num_steps:
            raise ValueError(
                f"`{name}` of `{owner}` is a schedule of {len(setting)} values, but the problem has "
                f"`num_steps` = {num_steps}: every step needs one. Give {num_steps} values, or one number for all."
            )


def _check_entry(owner: str, name: str, setting: Hyper, entry: str, hparams: TensorMapping, num_steps: int) -> None:
    if entry not in hparams:
        raise ValueError(
            f"`{name}` of `{owner}` reads the outer variable `{entry}`, which is not among {sorted(hparams)}. "
            "Return it from `init_hparams`, or give the setting as a number."
        )
    value = hparams[entry]
    if setting.per_step and (value.dim() == 0 or value.shape[0] != num_steps):
        raise ValueError(
            f"`{entry}` has shape {tuple(value.shape)}, but `{name}` of `{owner}` reads it as a schedule over "
            f"`num_steps` = {num_steps}. Its first axis must have one entry per step."
        )
    if setting.per is None and value.numel() != 1:
        raise ValueError(
            f"`{entry}` has shape {tuple(value.shape)}, but `{name}` of `{owner}` reads it as one value. Pass "
            "`per='step'` for a schedule, or `per='parameter'` for a value per weight."
        )
