"""Validation at the library's boundary: what users hand in, and what their functions return."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypertorch.types import TensorMapping


def is_count(value: object, *, least: int = 1) -> bool:
    """Returns whether a value is a whole number of at least `least`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_count(argument: str, value: object, why: str, *, least: int = 1, advice: str = "") -> None:
    """Raises `ValueError` unless a value is a whole number of at least `least`.

    Args:
        argument: how the message calls the argument, backticks included.
        value: what was passed for it.
        why: what a smaller one would mean.
        least: the smallest allowed.
        advice: how the last sentence goes on, such as ", or None for all".
    """
    if not is_count(value, least=least):
        raise ValueError(f"{argument} is {value!r}: {why}. Pass a whole number of at least {least}{advice}.")


def check_kind(argument: str, value: object, kind: type, why: str) -> None:
    """Raises `TypeError` unless a value is an instance of a class.

    Args:
        argument: how the message calls the argument, backticks included.
        value: what was passed for it.
        kind: the class.
        why: what the argument is for, and what to pass.
    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{argument} is {_shown(value)}, not {article} `{kind.__name__}`: {why}")


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class `{value.__name__}`"
    # Of a tensor or a module the type says more than pages of entries.
    return f"a {type(value).__name__}" if isinstance(value, (Tensor, nn.Module)) else f"{value!r:.100}"


def is_number(value: object) -> bool:
    """Returns whether a value is a real number that a float can hold, infinite and NaN included; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    # An integer of Python can be larger than any float: nothing can be computed with it.
    return not isinstance(value, int) or -sys.float_info.max <= value <= sys.float_info.max


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error says that memory, of an accelerator or of the host, was too small."""
    # PyTorch has no class of its own for the host.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def check_switch(name: str, value: object, *words: str) -> None:
    """Raises `TypeError` if a setting that is either on or off is neither True nor False, nor one of some words."""
    if not isinstance(value, bool) and not (isinstance(value, str) and value in words):
        others = "".join(f" nor {word!r}" for word in words)
        raise TypeError(f"`{name}` is {value!r}, which is neither True nor False{others}. Pass one of them.")


def check_seed(seed: object) -> None:
    """Raises unless a seed is a whole number from 0 to 2 ** 64 - 1.

    Random streams are keyed by 64 bits: another number would share the stream of one of these.

    Raises:
        TypeError: if it is no whole number (a bool is none).
        ValueError: if it is out of range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"`seed` is {seed!r}, a {type(seed).__name__}: it chooses the random numbers, so a whole number is needed. "
            "Pass for example `seed=0`."
        )
    if not 0 <= seed < 2**64:
        raise ValueError(
            f"`seed` must be at least 0 and below 2 ** 64, got {str(seed)[:40]}: it keys the random stream, and "
            "another number would share that of a seed in this range. Use for instance `seed=0`."
        )


def check_dense(name: str, value: Tensor) -> None:
    """Raises `TypeError` if a tensor has no plain entries: on the meta device, sparse, or nested."""
    if value.layout is not torch.strided or value.is_meta or value.is_nested:
        kind = "on the meta device" if value.is_meta else f"of {'nested' if value.is_nested else value.layout} layout"
        raise TypeError(
            f"`{name}` is a tensor {kind}, which has no plain entries to compute with. Use a dense tensor with values."
        )


def checked_path(argument: str, path: str | Path) -> Path:
    """Returns a path that a file or folder can have.

    Raises:
        ValueError: if it is empty, or holds a zero byte or what no system can write.
    """
    text = os.fspath(path)
    try:
        has_bytes = bool(os.fsencode(text))
    except UnicodeEncodeError:  # half a character
        has_bytes = False
    if not has_bytes or "\0" in text:
        raise ValueError(
            f"`{argument}` is {text!r}, which no file or folder can have for a path: nothing could be written there. "
            "Pass a name, such as 'runs/first'."
        )
    return Path(text)


def check_hparams(hparams: TensorMapping) -> torch.device:
    """Returns the device of the outer variables.

    Raises:
        TypeError: if it is no dictionary of floating-point tensors.
        ValueError: if it is empty, or spread over several devices.
    """
    if not isinstance(hparams, dict):
        raise _no_tensors(hparams)
    if not hparams:
        raise ValueError(
            "`hparams` is empty: without an outer variable there is nothing to differentiate in. Return at least one "
            "tensor from `init_hparams`."
        )
    device: torch.device | None = None
    # One loop for all that is asked of an entry: every run pays for it.
    for name, value in hparams.items():
        if not isinstance(value, Tensor):
            raise _no_tensors(hparams)
        if not isinstance(name, str):
            raise TypeError(
                f"`hparams` has the name {name!r}, a {type(name).__name__}: outer variables are called by text. Use "
                "the names of `problem.init_hparams()`."
            )
        if value.layout is not torch.strided or value.is_meta or value.is_nested:
            check_dense(f"hparams[{name!r}]", value)
        # Formats of a byte hold numbers, and compute none.
        if value.is_floating_point() and value.element_size() < 2:
            raise TypeError(
                f"`hparams[{name!r}]` has dtype {value.dtype}, in which nothing is computed. Use float32, or at least "
                "float16 or bfloat16."
            )
        if not value.is_floating_point():
            raise TypeError(
                f"`hparams[{name!r}]` has dtype {value.dtype}, which has no derivative. Use a floating-point tensor; "
                "integers that the losses need belong in the context or the batch."
            )
        # A run has one generator of noise beside the host's, that of its device.
        if device is not None and value.device != device:
            devices = sorted({str(value.device) for value in hparams.values()})
            raise ValueError(
                f"`hparams` lie on several devices, {devices}: a run happens on one. Move them with `.to(device)`."
            )
        device = value.device
    assert device is not None
    return device


def _no_tensors(hparams: object) -> TypeError:
    return TypeError(
        f"`hparams` is {_describe(hparams)}: the outer variables are a flat dict from names to tensors. Start from "
        "`problem.init_hparams()`."
    )


def check_params(params: Any, buffers: Sequence[str], num_steps: int) -> None:
    """Raises if `init_params` returned what cannot be trained."""
    if not isinstance(params, dict):
        raise _no_params(params)
    missing = [name for name in buffers if name not in params] if buffers else []
    if missing:
        raise ValueError(
            f"`InnerProblem.buffers` names {sorted(missing)}, which `init_params` did not return (it has "
            f"{sorted(params)}): a buffer needs a first value. Return it from `init_params`, or drop the name."
        )
    is_trained = False
    for name, value in params.items():
        if not isinstance(value, Tensor):
            raise _no_params(params)
        if name in buffers:
            continue
        is_trained = True
        if value.is_meta:
            check_dense(name, value)
        if not value.is_floating_point() and num_steps:
            raise TypeError(
                f"`InnerProblem.init_params` returned `{name}` with dtype {value.dtype}, which cannot be "
                "trained. Use a floating-point tensor, or name it in `InnerProblem.buffers`."
            )
    # A closed form in `init_params` has nothing to train, and needs no step.
    if not is_trained and num_steps:
        raise ValueError(
            f"`InnerProblem.init_params` returned no trained variable and `num_steps` is {num_steps}: there is nothing "
            "to step. Return one, or set `num_steps=0`."
        )


def _no_params(params: object) -> TypeError:
    return TypeError(
        f"`InnerProblem.init_params` returned {_describe(params)}: the inner variables are a flat dict from names "
        "to tensors. A module becomes one with `ht.FunctionalModule(module).init_params()`."
    )


def check_scalar(value: Any, source: str) -> None:
    """Raises if a loss is no scalar tensor, or has no derivative."""
    # A loss for each item would be summed without a word, as tasks are.
    if not isinstance(value, Tensor) or value.dim() != 0 or value.is_meta:
        raise ValueError(
            f"`{source}` returned {_describe(value)}: a loss is a scalar tensor. Reduce it, for instance with "
            "`.mean()`" + ("; with tasks, write it for one task." if source == "InnerProblem.loss" else ".")
        )
    # Said here: a count has no graph, and what fails next would speak of a path that is missing.
    if not value.dtype.is_floating_point:
        mend = (
            "Return a real number made of it, such as `.abs()` or `.real`"
            if value.dtype.is_complex
            else "Compute it by operations that have a derivative, and return counts from `metrics`; for "
            "`EvolutionStrategies`, which needs none, convert it with `.to(torch.float32)`"
        )
        raise TypeError(
            f"`{source}` returned a scalar of {value.dtype}: a loss is a real number, which has a gradient to descend. "
            f"{mend}."
        )


def check_metrics(metrics: TensorMapping, shape: tuple[int, ...]) -> None:
    """Raises if a metric is not one figure per task.

    Args:
        metrics: what an outer problem returned, with a tasks axis if it has tasks.
        shape: `()`, or `(tasks,)`.
    """
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise TypeError(
            f"`OuterProblem.metrics` returned {metrics!r:.100}, a {type(metrics).__name__}: figures are logged by "
            "name. Return a dict from names to tensors."
        )
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"as a {type(value).__name__}"
            raise ValueError(
                f"`OuterProblem.metrics` returned `{name}` {got}, where shape {shape} was expected: a metric is one "
                "figure per episode, a tensor. Reduce it to a scalar, for instance with `.mean()`."
            )


def check_buffers(new_buffers: Any, names: Sequence[str]) -> None:
    """Raises if the inner loss did not return new values for exactly the buffers."""
    # Said here, where the loss is at fault: what fails next would blame the dynamics.
    if set(new_buffers) != set(names):
        raise ValueError(
            f"`InnerProblem.loss` returned new values for the buffers {sorted(new_buffers)}, but "
            f"`InnerProblem.buffers` is {sorted(names)}: each is carried from step to step. Return `(loss, "
            "{name: new value})` with exactly these names."
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}{' on the meta device' if value.is_meta else ''}"
    if isinstance(value, dict):
        kinds = sorted({type(entry).__name__ for entry in value.values()})
        return f"a dict holding {kinds}"
    return f"a {type(value).__name__}"
