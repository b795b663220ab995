"""Whether the settings of a dynamics fit the inner params, the outer variables and the horizon, checked once a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hypertorch.dynamics.hyper import Hyper, Setting, UngroupedSetting
from hypertorch.dynamics.patterns import belonging, check_patterns
from hypertorch.types import TensorMapping


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
        if not isinstance(setting, Mapping):
            _check_setting(f"`{name}` of `{owner}`", setting, params, hparams, num_steps)
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
            shape = entry.shape[1:] if setting.per_step else entry.shape
            _check_shape(f"`{setting.entry_name(parameter)}`, read by {argument},", shape, parameter, param)
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
    if setting.per == "step" and value.numel() != num_steps:
        raise ValueError(
            f"`{entry}` has shape {tuple(value.shape)}, but {argument} reads it as one value per step. Pass "
            "`per='step,parameter'` for a schedule of every weight."
        )
    if setting.per is None and value.numel() != 1:
        raise ValueError(
            f"`{entry}` has shape {tuple(value.shape)}, but {argument} reads it as one value. Pass "
            "`per='step'` for a schedule, or `per='parameter'` for a value per weight."
        )


def _check_shape(argument: str, shape: torch.Size, parameter: str, param: Tensor) -> None:
    """Raises unless a tensor of this shape multiplies the parameter without changing its shape."""
    padded = (1,) * (param.dim() - len(shape)) + tuple(shape)
    if len(shape) > param.dim() or any(own not in (1, size) for own, size in zip(padded, param.shape, strict=True)):
        raise ValueError(
            f"{argument} has shape {tuple(shape)}, which does not broadcast against the inner parameter `{parameter}` "
            f"of shape {tuple(param.shape)}. Give it that shape, or one axis of size 1 for all entries along it; a "
            "mapping from names of parameters gives each its own tensor."
        )


def _check_dtype(argument: str, value: Tensor, dim: int, parameter: str, param: Tensor) -> None:
    """Raises if a tensor with this many axes would promote the parameter to another dtype."""
    if dim and torch.promote_types(value.dtype, param.dtype) != param.dtype:
        raise ValueError(
            f"{argument} is read from a tensor of dtype {value.dtype}, but the inner parameter `{parameter}` has "
            f"{param.dtype}: a step would change the parameter's dtype. Convert the tensor with `.to({param.dtype})`."
        )
