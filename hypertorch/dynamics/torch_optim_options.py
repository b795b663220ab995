"""Which optimisers and options the library `higher` differentiates rightly, and refusals of all others."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hypertorch.dynamics.declared import Range, check_range
from hypertorch.dynamics.settings import Hyper, Setting, parts

Option: TypeAlias = Setting | tuple[Setting, ...] | bool | None
"""What an optimiser takes by name: a setting, a pair of settings (such as `betas`), or a flag."""

Numeric: TypeAlias = Setting | tuple[Setting, ...]
"""The same without flags; a tuple is a pair of settings, and never a schedule."""


@dataclass(frozen=True, kw_only=True)
class Differentiability:
    """What `higher` 0.2.1 gets right of an optimiser; found by central differences, which the tests repeat.

    Attributes:
        exact: settings whose derivative is exact; the others are taken as plain numbers.
        instead: our own dynamics of the same rule, whose settings can all be learnt; None if there is none.
    """

    exact: frozenset[str]
    instead: str | None = None


DIFFERENTIABILITY: dict[type[torch.optim.Optimizer], Differentiability] = {
    # Momentum: where it is exactly 0 its term is skipped, derivative and all.
    torch.optim.SGD: Differentiability(exact=frozenset({"lr", "dampening", "weight_decay"}), instead="SGD"),
    # The second beta: the root of its bias correction is taken outside the graph.
    torch.optim.Adam: Differentiability(exact=frozenset({"lr", "betas[0]", "eps", "weight_decay"}), instead="Adam"),
    # The initial accumulator: read once by PyTorch's constructor, as a number.
    torch.optim.Adagrad: Differentiability(
        exact=frozenset({"lr", "lr_decay", "eps", "weight_decay"}), instead="Adagrad"
    ),
    torch.optim.Adadelta: Differentiability(exact=frozenset({"lr", "rho", "eps", "weight_decay"})),
    torch.optim.Adamax: Differentiability(exact=frozenset({"lr", "betas[0]", "betas[1]", "eps", "weight_decay"})),
    # All that enters the decaying step size: its power is taken outside the graph.
    torch.optim.ASGD: Differentiability(exact=frozenset({"weight_decay"})),
    torch.optim.RMSprop: Differentiability(exact=frozenset({"lr", "alpha", "eps", "weight_decay"}), instead="RMSprop"),
}

_OWN_ONLY = ("AdamW", "Muon", "NAdam", "RAdam")
"""Classes of `torch.optim` that `higher` does not know, and we have dynamics of."""

_WITHOUT_EFFECT = ("foreach", "fused", "capturable", "differentiable")
_ANY_NUMBER = Range(-math.inf, math.inf, None, "A setting is a number.")
_STAND_IN = 0.5  # for a learnt setting, where PyTorch checks the others: a value that every one of them can have


def check_class(optimizer: Any) -> None:
    """Raises unless this is a class of optimisers whose steps have a meaningful derivative.

    Raises:
        TypeError: if it is no class of optimisers.
        ValueError: if the class is known not to be differentiable. (Whether `higher` knows it is for `higher` to say.)
    """
    example = "`TorchOptim(torch.optim.Adamax, options={'lr': 0.01})`"
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"`optimizer` is an instance of {type(optimizer).__name__}: the tensors it holds, its state and its hooks "
            f"would play no part. Pass the class and its options, as in {example}."
        )
    if isinstance(optimizer, functools.partial):
        raise TypeError(
            f"`optimizer` is a partial of {optimizer.func!r} with arguments by place: they could not be read as "
            f"settings. Pass the class and its options by name, as in {example}."
        )
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise TypeError(f"`optimizer` is {optimizer!r}, not a class of `torch.optim`. Pass one, as in {example}.")
    if optimizer is torch.optim.Rprop:
        raise ValueError(
            "`optimizer` is Rprop, which moves by the sign of the gradient alone: the hypergradient of all that acts "
            "through the gradient is zero, and the outer loss jumps where a sign changes. Use a rule that is "
            "continuous in the gradient, such as `ht.dynamics.RMSprop`."
        )


def unsupported(optimizer: type[torch.optim.Optimizer]) -> ValueError:
    """Returns the error for a class that `higher` does not know."""
    known = ", ".join(sorted(kind.__name__ for kind in DIFFERENTIABILITY))
    has_own = optimizer in [getattr(torch.optim, name, None) for name in _OWN_ONLY]  # an older PyTorch lacks some
    own = f"`ht.dynamics.{optimizer.__name__}`" if has_own else f"one of {known}, or a dynamics of `ht.dynamics`"
    return ValueError(
        f"`optimizer` is {optimizer.__name__}, of which the library `higher` has no differentiable form. Use {own}."
    )


def numeric_options(optimizer: type[torch.optim.Optimizer], options: Mapping[str, Option]) -> dict[str, Numeric]:
    """Returns the options that are settings or tuples of settings, without the flags; all are checked.

    Raises:
        TypeError: if the options are no mapping, or one is of a wrong kind.
        ValueError: if the class does not take one, or `higher` would get its value or its derivative wrong.
    """
    owner = _owner(optimizer)
    if not isinstance(options, Mapping):
        raise TypeError(
            f"`options` of `{owner}` is {options!r}, not a mapping from names to values. Pass one, as in "
            "`options={'lr': 0.01}`."
        )
    defaults = _defaults(optimizer)
    numeric: dict[str, Numeric] = {}
    for name, option in options.items():
        if name not in defaults:
            raise ValueError(
                f"`options` of `{owner}` has {name!r}, which the class does not take. It takes: {', '.join(defaults)}."
            )
        if isinstance(defaults[name], tuple):
            numeric[name] = _as_tuple(owner, name, option, len(defaults[name]))
        elif isinstance(defaults[name], bool) or defaults[name] is None:
            _check_flag(optimizer, name, option)
        else:
            # A schedule may be a tuple, but from here on a tuple is a pair of settings.
            numeric[name] = list(option) if isinstance(option, tuple) else option  # type: ignore[assignment]
    facts = DIFFERENTIABILITY.get(optimizer)
    for name, setting in flattened_settings(numeric).items():
        check_range(owner, name, setting, _ANY_NUMBER)
        if facts is not None and name not in facts.exact and not isinstance(setting, (int, float)):
            raise _no_derivative(owner, name, setting, facts)
    return numeric


def flattened_settings(numeric: Mapping[str, Numeric]) -> dict[str, Setting]:
    """Returns the settings by name; those of a tuple by name and position, as in `betas[0]`."""
    settings: dict[str, Setting] = {}
    for name, option in numeric.items():
        if isinstance(option, tuple):
            settings.update({f"{name}[{position}]": setting for position, setting in enumerate(option)})
        else:
            settings[name] = option
    return settings


def check_by_torch(
    optimizer: type[torch.optim.Optimizer], options: Mapping[str, Option], numeric: Mapping[str, Numeric]
) -> dict[str, Any]:
    """Returns options that the class itself accepts: plain numbers and flags.

    The ranges that PyTorch allows are intervals, so the least and the greatest number of a schedule stand for all.

    Raises:
        ValueError: if PyTorch refuses a value.
    """
    stood_in = {**options, **{name: _map(option, _first_number) for name, option in numeric.items()}}
    least = {**stood_in, **{name: _map(option, _least) for name, option in numeric.items()}}
    greatest = {**stood_in, **{name: _map(option, _greatest) for name, option in numeric.items()}}
    for tried in (stood_in, least, greatest):
        try:
            optimizer([torch.zeros((), requires_grad=True)], **tried)
        except ValueError as error:
            raise ValueError(
                f"`options` of `{_owner(optimizer)}` are {dict(options)}, which PyTorch refuses: {error}. Correct that "
                "value."
            ) from error
    return stood_in


def _owner(optimizer: type[torch.optim.Optimizer]) -> str:
    return f"TorchOptim({optimizer.__name__})"


def _defaults(optimizer: type[torch.optim.Optimizer]) -> dict[str, Any]:
    # Without the first, the params.
    taken = list(inspect.signature(optimizer).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in taken}


def _as_tuple(owner: str, name: str, option: Any, length: int) -> tuple[Setting, ...]:
    if not isinstance(option, (tuple, list)) or len(option) != length:
        raise TypeError(
            f"`{name}` of `{owner}` is {option!r}: it takes {length} settings. Pass a tuple, in which each is a "
            "number, a schedule or a `Hyper`."
        )
    return tuple(option)


def _check_flag(optimizer: type[torch.optim.Optimizer], name: str, value: Any) -> None:
    """Raises `ValueError` if a flag is set that `higher` does not heed."""
    if not value:
        return
    owner = _owner(optimizer)
    if name == "maximize":
        facts = DIFFERENTIABILITY.get(optimizer)
        own = "" if facts is None or facts.instead is None else f", or use `ht.dynamics.{facts.instead}(maximize=True)`"
        raise ValueError(
            f"`maximize` of `{owner}` is {value}, which the library `higher` ignores: the run would descend. Negate "
            f"the inner loss{own}."
        )
    if name == "decoupled_weight_decay":
        raise ValueError(
            f"`decoupled_weight_decay` of `{owner}` is {value}, which the library `higher` ignores: the decay would "
            "enter the moments. Use `ht.dynamics.AdamW`."
        )
    if name in _WITHOUT_EFFECT:
        raise ValueError(
            f"`{name}` of `{owner}` is {value}, which has no effect on a differentiable step: it chooses among "
            "PyTorch's own kernels. Leave it out."
        )


def _no_derivative(owner: str, name: str, setting: Setting, facts: Differentiability) -> ValueError:
    own = (
        "" if facts.instead is None else f", or use `ht.dynamics.{facts.instead}`, of which all settings can be learnt"
    )
    return ValueError(
        f"`{name}` of `{owner}` is {setting!r}, but the library `higher` gets its derivative wrong, or drops it "
        f"(right are: {', '.join(sorted(facts.exact))}). Give it as a plain number{own}."
    )


def _map(option: Numeric, function: Any) -> Any:
    return tuple(function(setting) for setting in option) if isinstance(option, tuple) else function(option)


def _numbers(setting: Setting) -> Iterator[float]:
    for part in parts(setting):
        if isinstance(part, Hyper):
            continue
        if isinstance(part, Tensor):
            yield from part.flatten().tolist()
        elif isinstance(part, (int, float)):
            yield part
        else:
            yield from part


def _first_number(setting: Setting) -> float:
    return next(_numbers(setting), _STAND_IN)


def _least(setting: Setting) -> float:
    return min(_numbers(setting), default=_STAND_IN)


def _greatest(setting: Setting) -> float:
    return max(_numbers(setting), default=_STAND_IN)
