"""What decides the numbers of an outer run, as plain text: a run that goes on is compared with the one that it was."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from hypertorch.hypergradients import Hypergradient
from hypertorch.outer.settings import OuterSettings
from hypertorch.outer.storage.tensor_files import tensor_checksum
from hypertorch.problem import BilevelProblem

VALIDATION_SETTINGS = VALIDATION_METRIC, VALIDATION_MODE = "validation.metric", "validation.mode"
"""What a best figure is compared by; without one they may change."""

_LONGEST = 200  # characters of a text that is kept; of a longer one, such as a long schedule, a checksum
_DEEPEST = 6  # objects within objects: they may refer to each other in a circle


def fingerprint(
    loop: OuterSettings, backend: Hypergradient, problem: BilevelProblem | None, parts: Mapping[str, object]
) -> dict[str, str]:
    """Returns the settings that decide the numbers of a run, by name, as text.

    Not among them are the tensors that a problem holds, the code of its losses, and what only says how long a run is
    and where it is kept. A function is known by its name.

    Args:
        loop: the outer loop.
        backend: how hypergradients are computed.
        problem: the problem of the first outer step; None leaves its settings out.
        parts: further settings, by name.
    """
    settings: dict[str, object] = {
        "backend": backend,
        "clip_norm": loop.clip_norm,
        "constraints": dict(loop.constraints or {}),
        "on_non_finite": loop.on_non_finite,
        "inner_dtype": loop.execution.inner_dtype,
        **parts,
    }
    if loop.validation is not None:
        settings |= {VALIDATION_METRIC: loop.validation.metric, VALIDATION_MODE: loop.validation.mode}
    return described(settings) if problem is None else {**described(settings), **problem_settings(problem)}


def problem_settings(problem: BilevelProblem) -> dict[str, str]:
    """Returns what of a problem decides the numbers, by name, as text; its tensors and its code are not known."""
    return described(
        {
            "inner": type(problem.inner),
            "outer": type(problem.outer),
            "dynamics": problem.dynamics,
            "num_steps": problem.num_steps,
            "num_tasks": problem.num_tasks,
            "warm_start": problem.warm_start,
            "seed": problem.seed,
        }
    )


def described(settings: Mapping[str, object]) -> dict[str, str]:
    """Returns settings, and what they hold, by name, as text."""
    return dict(entry for name, value in settings.items() for entry in _described(name, value, _DEEPEST))


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Returns what differs between two fingerprints, in words, by the name of the setting.

    Where a class differs, what it holds is left out.
    """
    found = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    classes = [f"{name.removesuffix('class').rstrip('.')}." for name in found]
    return {
        name: f"`{name}` is {now.get(name, 'absent')}, and was {before.get(name, 'absent')}"
        for name in found
        if name.endswith(".class") or not any(name.startswith(outer) for outer in classes)
    }


def _described(name: str, value: object, depth: int) -> Iterator[tuple[str, str]]:
    """Yields a setting, and the settings in it."""
    parts = _parts(value)
    yield name, _text(value) if parts is None else _kind(value)
    if parts is not None and depth:
        for part, entry in parts.items():
            yield from _described(f"{name}.{part}", entry, depth - 1)


def _parts(value: object) -> Mapping[Any, object] | None:
    """Returns what an object holds, by name; None for one that is described as a whole."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, partial):
        return {"function": value.func, **dict(enumerate(value.args)), **value.keywords}
    if isinstance(value, nn.Module):
        return value.state_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    # A schedule is a long list of numbers, and one setting.
    if isinstance(value, (list, tuple)) and not all(isinstance(entry, (int, float, str)) for entry in value):
        return dict(enumerate(value))
    return None


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return f"{kind} of checksum {tensor_checksum(value):08x}" if value.numel() > 1 else f"{kind} {value.tolist()}"
    if isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType)):
        return f"{value.__module__}.{value.__qualname__}"
    # The text of a dtype or a device says all of it; that of other objects may hold their address.
    if value is None or isinstance(value, (bool, int, float, str, list, tuple)) or type(value).__module__ == "torch":
        text = repr(value)
        return text if len(text) <= _LONGEST else f"{text[:40]}... of checksum {zlib.crc32(text.encode()):08x}"
    return _kind(value)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
