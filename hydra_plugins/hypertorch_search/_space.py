"""The space of a search, from the overrides of the command line."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

Value: TypeAlias = "str | int | float"
Point: TypeAlias = "dict[str, Value]"
"""A value for every setting that is searched and not left out by its condition."""

_HOW = "Write for example 'outer_optimizer.lr=tag(log,interval(1e-4,1e-1))'."


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Where a setting is searched at all.

    Args:
        name: another setting that is searched.
        values: its values, as they are written on the command line.
    """

    name: str
    values: tuple[str, ...]

    def holds(self, point: Mapping[str, Value]) -> bool:
        """Returns whether a point has one of the values."""
        return self.name in point and str(point[self.name]) in self.values


@dataclass(frozen=True, kw_only=True)
class Space:
    """The settings that are searched, those under a condition behind what the condition names.

    Args:
        distributions: by name, as the setting is written on the command line.
        conditions: of some of them.
    """

    distributions: dict[str, BaseDistribution]
    conditions: dict[str, Condition]

    def suggest(self, trial: Trial) -> Point:
        """Returns the point that a trial draws, or has drawn."""
        point: Point = {}
        for name, distribution in self.distributions.items():
            if not self._is_active(name, point):
                continue
            if isinstance(distribution, CategoricalDistribution):
                point[name] = trial.suggest_categorical(name, distribution.choices)  # pyright: ignore[reportArgumentType]
            elif isinstance(distribution, IntDistribution):
                low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
                point[name] = trial.suggest_int(name, low, high, step=step, log=log)
            elif isinstance(distribution, FloatDistribution):
                low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
                point[name] = trial.suggest_float(name, low, high, step=step, log=log)
        return point

    def ends(self) -> list[Point]:
        """Returns points that have, together, every choice and both ends of every range."""
        found = {}
        for name, distribution in self.distributions.items():
            for value in _ends(distribution):
                wanted: Point = {name: value}
                parent = name
                while parent in self.conditions:  # what it depends on takes a value with which it is searched
                    condition = self.conditions[parent]
                    parent = condition.name
                    wanted[parent] = next(
                        one for one in _values(self.distributions[parent]) if str(one) in condition.values
                    )
                point: Point = {}
                for other, there in self.distributions.items():
                    if self._is_active(other, point):
                        point[other] = wanted.get(other, _ends(there)[0])
                found[tuple(point.items())] = point
        return list(found.values())

    def grid(self) -> list[Point]:
        """Returns every point of a space of choices and ranges of a finite number of values.

        Raises:
            ValueError: if there is an interval.
        """
        values = [self._listed(name) for name in self.distributions]
        found = {}
        for combination in itertools.product(*values):
            point: Point = {}
            for name, value in zip(self.distributions, combination, strict=True):
                if self._is_active(name, point):
                    point[name] = value
            found[tuple(point.items())] = point
        return list(found.values())

    def start(self, table: object) -> Point:
        """Returns a point to begin with, of some of the settings.

        Args:
            table: values by name, as given by the user.

        Raises:
            ValueError: if it is no table, names another setting, or a value is not in what is searched.
        """
        if not isinstance(table, Mapping) or not table:
            raise ValueError(
                f"`hydra.sweeper.starts` has the entry {table!r}, which is no table of settings. Write for example "
                "'hydra.sweeper.starts=[{outer_optimizer.lr:0.1}]'."
            )
        point: Point = {}
        for name, value in table.items():
            if name not in self.distributions:
                raise ValueError(
                    f"`hydra.sweeper.starts` names {name!r}, which is not searched. Use some of: "
                    f"{', '.join(self.distributions)}."
                )
            point[name] = _found(name, value, self.distributions[name])
        return point

    def _listed(self, name: str) -> list[Value]:
        try:
            return _values(self.distributions[name])
        except ValueError:
            raise ValueError(
                f"`{name}` is an interval, but `hydra.sweeper.sampler` is 'grid', which needs values: there is no end "
                f"of them. Write {name}=1,2,3 or {name}=range(1,8), or choose another sampler."
            ) from None

    def _is_active(self, name: str, point: Mapping[str, Value]) -> bool:
        return name not in self.conditions or self.conditions[name].holds(point)


def _found(name: str, value: object, distribution: BaseDistribution) -> Value:
    """Returns a value in the form in which a distribution has it."""
    if isinstance(distribution, CategoricalDistribution):
        for choice in distribution.choices:
            if str(choice) == str(value):
                return choice  # pyright: ignore[reportReturnType]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        is_whole = isinstance(distribution, IntDistribution) and float(value).is_integer()
        if distribution._contains(float(value)) and (is_whole or not isinstance(distribution, IntDistribution)):
            return int(value) if is_whole else value
    raise ValueError(
        f"`hydra.sweeper.starts` has {value!r} for `{name}`, which is not in what is searched, {distribution}. "
        "Start within it, or widen it."
    )


def overrides_of(point: Mapping[str, Value]) -> list[str]:
    """Returns a point in the form of the command line."""
    return [f"{name}={value!r}" if isinstance(value, float) else f"{name}={value}" for name, value in point.items()]


def read_space(overrides: Sequence[Override], conditions: Mapping[str, str]) -> Space:
    """Returns the space that the swept overrides of a command line span.

    Args:
        overrides: those that sweep.
        conditions: `setting -> other=value,value`.

    Raises:
        ValueError: if a range is empty or a condition names what is not searched.
    """
    distributions = {item.get_key_element(): _distribution(item) for item in overrides}
    read = {name: _condition(name, text, distributions) for name, text in conditions.items()}
    ordered: dict[str, BaseDistribution] = {}
    while len(ordered) < len(distributions):
        ready = [
            name for name in distributions if name not in ordered and (name not in read or read[name].name in ordered)
        ]
        if not ready:
            name = next(name for name in read if name not in ordered)
            raise ValueError(
                f"`hydra.sweeper.conditions` has {name!r} depend on itself, through {read[name].name!r}: it would "
                "never be searched. Take one of the conditions away."
            )
        ordered |= {name: distributions[name] for name in ready}
    return Space(distributions=ordered, conditions=read)


def _distribution(override: Override) -> BaseDistribution:
    name, value = override.get_key_element(), override.value()
    log = bool(isinstance(value, (RangeSweep, IntervalSweep)) and "log" in value.tags)
    unknown = getattr(value, "tags", set()) - {"log"}
    if unknown:
        raise ValueError(
            f"`{override.input_line}` has the tag {sorted(unknown)[0]!r}, which says nothing here. Use log."
        )
    if isinstance(value, IntervalSweep):
        return _interval(override, value, log=log)
    if isinstance(value, RangeSweep):
        return _range(override, value, log=log)
    if "log" in getattr(value, "tags", set()):
        raise ValueError(f"`{override.input_line}` has the tag log, but lists values, which have no scale. {_HOW}")
    choices = tuple(override.sweep_string_iterator())
    if len(set(choices)) < len(choices) or not choices:
        raise ValueError(
            f"`{override.input_line}` lists {'a value twice' if choices else 'no value'}: it cannot be chosen from. "
            f"Write {name}=A,B with each value once."
        )
    return CategoricalDistribution(choices)


def _interval(override: Override, value: IntervalSweep, *, log: bool) -> BaseDistribution:
    low, high = value.start, value.end
    _check_whole(override)
    if low is not None and low == high:
        raise ValueError(
            f"`{override.input_line}` holds one value, {low}: there is nothing to search. Write "
            f"{override.get_key_element()}={low} for all trials, or ends that differ. {_HOW}"
        )
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"`{override.input_line}` goes from {low} to {high}, which is no interval: nothing can be drawn from it. "
            f"Write the lower end first. {_HOW}"
        )
    _check_log(override, low, log=log)
    if isinstance(low, int) and isinstance(high, int):  # int(interval(1,8))
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def _check_whole(override: Override) -> None:
    """Checks that Hydra has not cut an end of `int(interval(...))`, by which numbers outside would be drawn."""
    text = str(override.input_line).partition("=")[2]
    if re.search(r"\bint\s*\(", text) is None or (inner := re.search(r"interval\s*\([^()]*\)", text)) is None:
        return
    interval = OverridesParser.create().parse_override(f"x={inner[0]}").value()
    assert isinstance(interval, IntervalSweep)
    for end in (interval.start, interval.end):
        if end is not None and math.isfinite(end) and not float(end).is_integer():
            raise ValueError(
                f"`{override.input_line}` has the end {end}, which is no whole number: it would be cut to "
                f"{int(end)}, and what is drawn would not be what is written. Write whole ends, as in "
                f"{override.get_key_element()}=int(interval(1,8)), which are 1 to 8."
            )


def _range(override: Override, value: RangeSweep, *, log: bool) -> BaseDistribution:
    numbers = [] if value.step == 0 else list(value.range())
    if not numbers:
        raise ValueError(
            f"`{override.input_line}` holds no number. Write range(1,8), which are 1 to 7 (as in Python, the end is "
            "left out), or int(interval(1,8)), which are 1 to 8."
        )
    low, high, step = min(numbers), max(numbers), abs(value.step)
    _check_log(override, low, log=log)
    if log and (step != 1 or not all(isinstance(number, int) for number in numbers)):
        raise ValueError(f"`{override.input_line}` has the tag log and a step, which contradict each other. {_HOW}")
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(low), int(high), step=int(step), log=log)
    return FloatDistribution(low, _at(low, step, len(numbers) - 1), step=float(step))


def _check_log(override: Override, low: float, *, log: bool) -> None:
    if log and low <= 0:
        raise ValueError(
            f"`{override.input_line}` has the tag log and begins at {low}, which has no logarithm. Begin above 0. "
            f"{_HOW}"
        )


def _condition(name: str, text: str, distributions: Mapping[str, BaseDistribution]) -> Condition:
    other, is_one, listed = text.partition("=")
    values = _spelt(other, listed) if listed else ()
    where = f"`hydra.sweeper.conditions` has {name!r} under {text!r}"
    for setting in (name, other):
        if not is_one or not listed or setting not in distributions:
            raise ValueError(
                f"{where}, but `{setting}` is not searched, so there is nothing to leave out or to go by. Searched "
                f"are: {', '.join(distributions)}."
            )
    there = distributions[other]
    known = None if isinstance(there, FloatDistribution) else [str(value) for value in _values(there)]
    missing = [value for value in values if known is None or value not in known]
    if missing:
        raise ValueError(
            f"{where}, but `{other}` never is {missing[0]!r}: `{name}` would not be searched there. Its values are "
            f"{'any in an interval' if known is None else ', '.join(known)}."
        )
    return Condition(name=other, values=values)


def _spelt(name: str, listed: str) -> tuple[str, ...]:
    """Returns listed values as Hydra spells them where they are swept: `true` as `True`."""
    return tuple(OverridesParser.create().parse_override(f"{name}=choice({listed})").sweep_string_iterator())


def _ends(distribution: BaseDistribution) -> list[Value]:
    if isinstance(distribution, CategoricalDistribution):
        return [str(choice) for choice in distribution.choices]
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    return [distribution.low, distribution.high]


def _values(distribution: BaseDistribution) -> list[Value]:
    if isinstance(distribution, CategoricalDistribution):
        return [str(choice) for choice in distribution.choices]
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        raise ValueError("`distribution` is an interval, which lists no values. Use its ends.")
    count = round((distribution.high - distribution.low) / distribution.step) + 1
    return [_at(distribution.low, distribution.step, index) for index in range(count)]


def _at(low: float, step: float, index: int) -> float:
    """Returns a number of a range; in decimals, as Optuna counts, or 0.1 + 2 * 0.1 would not be 0.3."""
    return float(Decimal(str(low)) + index * Decimal(str(step)))


def numbers(space: Space) -> int:
    """Returns how many settings are numbers that every point has."""
    return sum(
        not isinstance(distribution, CategoricalDistribution) and name not in space.conditions
        for name, distribution in space.distributions.items()
    )


def described(space: Space) -> dict[str, Any]:
    """Returns the space in plain values, for comparison with that of a study."""
    return {
        "space": {name: repr(distribution) for name, distribution in space.distributions.items()},
        "conditions": {name: f"{one.name}={','.join(one.values)}" for name, one in space.conditions.items()},
    }
