"""Outer variables in a file of their own: what a finished run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import checked_path
from hypertorch.errors import CheckpointError
from hypertorch.outer.guards.finiteness import check_finite
from hypertorch.outer.storage.checkpoints import load_checkpoint
from hypertorch.outer.storage.tensor_files import read_tensor_file, write_tensor_file
from hypertorch.types import TensorDict, TensorMapping

HPARAMS_FILE = "hparams.safetensors"
"""Name of the file with the trained outer variables in the folder of a run's checkpoints."""

_FORMAT = "hypertorch.hparams"


@typed("path")
def save_hparams(path: str | Path, hparams: TensorMapping) -> None:
    """Writes outer variables to a safetensors file, whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        hparams: the outer variables.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    file = checked_path("path", path)
    if not isinstance(hparams, Mapping) or not all(isinstance(value, Tensor) for value in hparams.values()):
        raise TypeError(
            f"`hparams` is {hparams!r:.100}, no dict from names to tensors: nothing else is kept in such a file. Pass "
            "outer variables, such as `trained.best_hparams`."
        )
    # Safetensors sorts its entries; the order is that of the outer variables.
    texts = {"format": _FORMAT, "order": json.dumps(list(hparams))}
    write_tensor_file(file, hparams, texts)


@typed("path", "device")
def load_hparams(path: str | Path, *, device: torch.device | str = "cpu") -> TensorDict:
    """Returns the outer variables of a run.

    Args:
        path: a file that `save_hparams` wrote; a checkpoint of a run, which gives the best outer variables so far by
            validation, or the last ones without a validation; or a folder that holds `hparams.safetensors`, itself or
            in its folder `checkpoints`.
        device: where the tensors go.

    Raises:
        CheckpointError: if there is no such file, or it is damaged or of another kind.
        NonFiniteError: if they hold NaN or infinity.
    """
    path = checked_path("path", path)
    try:
        if path.is_dir():
            inside = path / "checkpoints" / HPARAMS_FILE
            path = inside if inside.is_file() else path / HPARAMS_FILE
        is_there = path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be looked into
        is_there = False
    if not is_there:
        raise CheckpointError(
            f"`path` is {str(path)!r}, where there is no file: a run writes `{HPARAMS_FILE}` into the folder of its "
            "checkpoints when it ends. Finish the run with `resume=True`, or pass one of its checkpoints."
        )
    remedy = "Use another checkpoint of the run, or write the file again."
    tensors, texts = read_tensor_file(path, remedy=remedy)
    if texts.get("format") == _FORMAT:
        try:
            hparams = {name: tensors[name] for name in json.loads(texts["order"])}
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"`{path}` has a header that `save_hparams` never writes ({type(error).__name__}: {error}): its "
                f"content was altered. {remedy}"
            ) from error
    else:
        checkpoint = load_checkpoint(path, remedy="Pass a file that `save_hparams` or `Checkpoints` wrote.")
        # Empty without a validation, and before the first.
        hparams = checkpoint.best_hparams or checkpoint.hparams
    # Written by another program, a file can hold what no run writes.
    check_finite(hparams, where=f"in {str(path)!r}", remedy="Use another checkpoint of the run, or train again.")
    return {name: value.to(device) for name, value in hparams.items()}
