"""Checkpoints of an outer run: everything that the next outer step depends on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import KW_ONLY, MISSING, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from hypertorch.checks.argument_types import check_type
from hypertorch.checks.values import checked_path, is_count
from hypertorch.errors import CheckpointError
from hypertorch.outer.storage.encoding import decode, encode
from hypertorch.outer.storage.tensor_files import PARTIAL, read_tensor_file, write_tensor_file
from hypertorch.types import TensorDict, TensorMapping

_FORMAT = "hypertorch.checkpoint"
_VERSION = "2"
# A whole name: a file that is still being written ends in `.partial` and does not match.
_FILE_NAME = re.compile(r"step_(\d+)\.safetensors")


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The state of an outer run after `step` outer steps.

    Attributes:
        step: outer steps done.
        hparams: the outer variables after them.
        optimizer: the outer optimizer's state dictionary.
        scheduler: the scheduler's state dictionary; None without one.
        carry: what the last hypergradient handed on to the next.
        carry_on_host: names of the entries of `carry` that stay in host memory, even if `hparams` do not.
        task_route: how tasks are run; None if that was not yet decided.
        chunk: most tasks at once, where more did not fit into memory; None where they did.
        non_finite_steps: outer steps that were skipped or shortened for NaN or infinity.
        best_hparams: the best outer variables by validation; empty without any.
        best_step: outer steps done when they were found.
        best_value: their figure of merit.
        validated_step: outer steps done at the last validation.
        seconds: run time so far.
        settings: what decides the numbers of the run, as text; see `fingerprint`.
    """

    step: int
    hparams: TensorDict
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None = None
    carry: TensorDict = field(default_factory=dict)
    carry_on_host: tuple[str, ...] = ()
    task_route: str | None = None
    chunk: int | None = None
    non_finite_steps: int = 0
    best_hparams: TensorDict = field(default_factory=dict)
    best_step: int | None = None
    best_value: float | None = None
    validated_step: int = 0
    seconds: float = 0.0
    settings: dict[str, str] = field(default_factory=dict)


_TENSOR_FIELDS = ("hparams", "best_hparams", "carry")
# What the other entries are; None where there was none.
_KINDS: dict[str, Any] = {
    "step": int,
    "optimizer": dict,
    "scheduler": (dict, NoneType),
    "carry_on_host": tuple,
    "task_route": (str, NoneType),
    "chunk": (int, NoneType),
    "non_finite_steps": int,
    "best_step": (int, NoneType),
    "best_value": (float, NoneType),
    "validated_step": int,
    "seconds": float,
    "settings": dict,
}
_JSON_FIELDS = tuple(name for name in Checkpoint.__dataclass_fields__ if name not in _TENSOR_FIELDS)


@dataclass(frozen=True)
class Checkpoints:
    """Where an outer run keeps its checkpoints, and how often it writes one.

    A checkpoint is one safetensors file, `step_00000500.safetensors`. Its header holds as JSON what is not a tensor, so
    that reading one never runs code. A file appears whole or not at all, and has a checksum. The run writes one every
    `every` outer steps, at the end, and when it is interrupted; beside the outer steps, from a copy of its state in
    host memory, one file at a time.

    Args:
        directory: folder of the files; made when a run starts.
        every: outer steps between two checkpoints, at least 1.
        keep: how many of the newest are kept, at least 1.

    Raises:
        ValueError: if `every` or `keep` is below 1.
    """

    directory: Path
    _: KW_ONLY
    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        check_type("Checkpoints", "directory", self.directory, str | Path, MISSING)
        object.__setattr__(self, "directory", checked_path("directory", self.directory))
        for name, value, purpose in (("every", self.every, "written"), ("keep", self.keep, "kept")):
            if not is_count(value):
                raise ValueError(
                    f"`{name}` of `Checkpoints` is {value!r}: no checkpoint would be {purpose}. Pass a whole number of "
                    "at least 1, or leave `checkpoints` out for a run without them."
                )

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint, removes the ones that are no longer kept, and returns the new file.

        Raises:
            CheckpointError: if the file cannot be written, or a part of the state can be kept neither as a tensor nor
                as JSON (the message names it).
        """
        return self.prepare(checkpoint)()

    def prepare(self, checkpoint: Checkpoint) -> Callable[[], Path]:
        """Returns what writes a checkpoint as it is now: the run may go on, and change it, before that is called.

        Cost: a copy of its tensors in host memory.

        Returns:
            A function for any thread, which returns the new file and raises as `save` does.

        Raises:
            CheckpointError: if a part of the state can be kept neither as a tensor nor as JSON (the message names it).
        """
        tensors: TensorDict = {}
        for name in _TENSOR_FIELDS:
            # A prefix for each field: `hparams` and `best_hparams` have the same names.
            tensors.update({f"{name}/{key}": value for key, value in getattr(checkpoint, name).items()})
        state = {name: encode(getattr(checkpoint, name), name, tensors) for name in _JSON_FIELDS}
        # Safetensors sorts its entries, but the optimizer's state is matched to hparams by their order.
        state["order"] = {name: list(getattr(checkpoint, name)) for name in _TENSOR_FIELDS}
        texts = {"format": _FORMAT, "version": _VERSION, "state": json.dumps(state)}
        path = self.directory / f"step_{checkpoint.step:08d}.safetensors"
        # The optimizer changes its tensors in place.
        copies = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

        def write() -> Path:
            write_tensor_file(path, copies, texts)
            self._remove_old()  # after the new one is complete: a crash in between leaves one too many, never none
            return path

        return write

    def paths(self) -> list[Path]:
        """Returns the files of complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = [(match, path) for path in self.directory.iterdir() if (match := _FILE_NAME.fullmatch(path.name))]
        # By number, not by name: more than eight digits would sort before fewer.
        return [path for _, path in sorted((int(match[1]), path) for match, path in found)]

    def newest(self) -> Path | None:
        """Returns the file of the newest complete checkpoint; None if there is none."""
        paths = self.paths()
        return paths[-1] if paths else None

    def load(self, path: Path) -> Checkpoint:
        """Returns a checkpoint, with its tensors in host memory.

        Raises:
            CheckpointError: if the file is damaged; the message says which checkpoint to go on from instead.
        """
        return load_checkpoint(path, remedy=self._remedy(path))

    def _remedy(self, path: Path) -> str:
        paths = self.paths()
        earlier = paths[: paths.index(path)] if path in paths else []
        # Only if it is deleted: a run resumes from the newest file that there is.
        goes_on = f"`{earlier[-1].name}`, the previous checkpoint" if earlier else "the start: there is no earlier one"
        return f"Delete this file; the run then resumes from {goes_on}."

    def remove_leftovers(self) -> None:
        """Removes what processes that were killed while they wrote left in the folder; its one writer calls it."""
        # The second kind is safetensors' own.
        for pattern in (f"*.safetensors{PARTIAL}", ".tmp??????"):
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)

    def _remove_old(self) -> None:
        for path in self.paths()[: -self.keep]:
            path.unlink(missing_ok=True)


def load_checkpoint(path: Path, *, remedy: str) -> Checkpoint:
    """Returns the checkpoint in a file, with its tensors in host memory.

    Args:
        path: the file.
        remedy: what to do if it is damaged, the last sentence of the message.

    Raises:
        CheckpointError: if the file is missing or damaged, or is no checkpoint of this version.
    """
    tensors, texts = read_tensor_file(path, remedy=remedy)
    if texts.get("format") != _FORMAT:
        raise CheckpointError(f"`{path}` is of format {texts.get('format')!r}, not a checkpoint of a run. {remedy}")
    # No guess at another version: a state that is read wrongly would go on without an error.
    if texts.get("version") != _VERSION:
        raise CheckpointError(
            f"`{path}` is a checkpoint of version {texts.get('version')!r}; this release of hypertorch reads version "
            f"{_VERSION!r} only. Resume with the release that wrote it, or start again in another folder."
        )
    try:
        state = json.loads(texts["state"])
        entries = {name: {key: tensors[f"{name}/{key}"] for key in keys} for name, keys in state.pop("order").items()}
        unusual = {*entries, *state} ^ {*_TENSOR_FIELDS, *_JSON_FIELDS}
        if unusual:
            raise ValueError(f"entries {sorted(unusual)} are missing or unknown")
        return _checked(Checkpoint(**entries, **{name: decode(value, tensors) for name, value in state.items()}))
    # A checksum protects from damage, not from a forger: a header may hold anything, and these are what it can cause.
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}` has a header that no run writes ({type(error).__name__}: {error}): its content was altered. "
            f"{remedy}"
        ) from error


def _checked(found: Checkpoint) -> Checkpoint:
    """Returns a checkpoint; raises a `TypeError` or `ValueError` if an entry is none that a run writes."""
    for name, kinds in _KINDS.items():
        value = getattr(found, name)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"`{name}` is {value!r}")
    counts = (found.step, found.validated_step, found.non_finite_steps, found.best_step or 0)
    if not all(0 <= count <= found.step for count in counts):
        raise ValueError(f"`step`, `validated_step`, `non_finite_steps` and `best_step` are {counts}")
    if found.chunk is not None and found.chunk < 1:
        raise ValueError(f"`chunk` is {found.chunk}")
    if not 0.0 <= found.seconds < math.inf:
        raise ValueError(f"`seconds` is {found.seconds}")
    if not all(isinstance(text, str) for text in (*found.carry_on_host, *found.settings, *found.settings.values())):
        raise TypeError("`carry_on_host` or `settings` holds what is no text")
    return found


def check_same_hparams(path: Path, stored: TensorDict, expected: TensorDict) -> None:
    """Raises `CheckpointError` if a checkpoint's outer variables are not those of the problem, naming what differs."""
    differing = differences(stored, expected, "in the checkpoint")
    # The optimizer's state has positions, not names: in another order it would go to the wrong variables.
    if not differing and list(stored) != list(expected):
        differing = [f"their order ({list(stored)} in the checkpoint, {list(expected)} in the problem)"]
    if differing:
        raise CheckpointError(
            f"`{path}` belongs to another problem; its hyperparameters differ in {', '.join(differing)}: the run "
            "cannot go on from it. Resume with the settings that it was started with, or choose another folder."
        )


def differences(given: TensorMapping, expected: TensorMapping, place: str) -> list[str]:
    """Returns, in words, where names, shapes and types of outer variables differ from those of the problem.

    Args:
        given: the outer variables.
        expected: those of the problem.
        place: where the given ones are, as in "in the checkpoint".
    """
    return [
        f"`{name}` ({_describe(given.get(name))} {place}, {_describe(expected.get(name))} in the problem)"
        for name in {**given, **expected}
        if _describe(given.get(name)) != _describe(expected.get(name))
    ]


def _describe(value: Any) -> str:
    return "absent" if value is None else f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
