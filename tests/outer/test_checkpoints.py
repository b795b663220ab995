"""Checkpoint files: what goes in comes out, damage is noticed, and a kill leaves whole files only."""

from __future__ import annotations

import errno
import json
import math
from collections import Counter, OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hypertorch.errors import CheckpointError, NonFiniteError
from hypertorch.outer.storage import tensor_files
from hypertorch.outer.storage.checkpoints import Checkpoint, Checkpoints
from hypertorch.outer.storage.encoding import decode, encode
from hypertorch.outer.storage.hparams_file import load_hparams, save_hparams


def make_checkpoint(step: int = 3, **changes: Any) -> Checkpoint:
    settings: dict[str, Any] = {
        "hparams": {"z": torch.arange(3.0), "a/b": torch.tensor(2.0, dtype=torch.float64)},
        "optimizer": {"state": {0: {"m": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.99), "params": [0]}]},
        "carry": {"index": torch.tensor(7)},
        "carry_on_host": ("index",),
        "best_hparams": {"z": torch.zeros(3), "a/b": torch.tensor(1.0, dtype=torch.float64)},
        "best_step": 2,
        "best_value": 0.1 + 0.2,
        **changes,
    }
    return Checkpoint(step=step, **settings)


# Encoding


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -0.0,
        0.1,
        math.inf,
        -math.inf,
        "text",
        [],
        (),
        [1, (2, [None, ("x",)])],
        {},
        {0: {"step": 1}, "0": 2, None: 3, (1, "a"): 4, 1.5: 5},
        {"$tensor": "not one", "$dict": []},
        OrderedDict([("b", 1), ("a", 2)]),
        Counter({3: 2, 5: 1}),
        10**30,
    ],
    ids=repr,
)
def test_values_come_back_as_they_were(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value, "state", {}), allow_nan=False)), {})
    assert again == value
    assert type(again) is type(value)
    assert repr(again) == repr(value)


def test_nan_comes_back() -> None:
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan, "state", {}))), {}))


def test_tensors_are_put_aside_under_their_path() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {"state": {0: {"m": torch.ones(2)}, "0": {"m": torch.zeros(3)}}, "lr": [torch.tensor(0.1)]}
    again = decode(encode(value, "optimizer", tensors), tensors)
    assert set(tensors) == {"optimizer/state/0/m", "optimizer/state/0/m'", "optimizer/lr/0"}
    assert again["state"][0]["m"].shape == (2,)
    assert again["state"]["0"]["m"].shape == (3,)
    assert torch.equal(again["lr"][0], value["lr"][0])


@pytest.mark.parametrize("value", [Fraction(1, 2), {1, 2}, print, torch.float32, complex(1, 2)], ids=repr)
def test_what_cannot_be_kept_is_named(value: Any) -> None:
    message = rf"`optimizer/param_groups/0/odd` is a {type(value).__name__}, which a checkpoint cannot hold"
    with pytest.raises(CheckpointError, match=message):
        encode({"param_groups": [{"odd": value}]}, "optimizer", {})


def test_a_checkpoint_refuses_what_cannot_be_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"`scheduler/by` is a function"):
        checkpoints.save(make_checkpoint(scheduler={"by": lambda step: step}))
    assert checkpoints.newest() is None


# Files


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    again = checkpoints.load(checkpoints.save(checkpoint))
    assert list(again.hparams) == ["z", "a/b"]
    for ours, theirs in ((again.hparams, checkpoint.hparams), (again.best_hparams, checkpoint.best_hparams)):
        for name in theirs:
            assert torch.equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
    assert torch.equal(again.optimizer["state"][0]["m"], torch.ones(3))
    assert again.optimizer["param_groups"] == checkpoint.optimizer["param_groups"]
    assert again.carry["index"].dtype == torch.int64
    assert again.carry_on_host == ("index",)
    assert (again.step, again.best_step, again.best_value) == (3, 2, 0.1 + 0.2)
    assert again.scheduler is None
    assert again.task_route is None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.empty(0, 3),
        torch.arange(6).reshape(2, 3).T,
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.arange(10.0)[3:5],
        torch.ones(2, requires_grad=True),
        torch.zeros(1).expand(4),
    ],
)
def test_any_tensor_comes_back(tmp_path: Path, tensor: torch.Tensor) -> None:
    save_hparams(tmp_path / "file", {"x": tensor, "same": tensor})
    again = load_hparams(tmp_path / "file")
    for value in again.values():
        assert torch.equal(value, tensor)
        assert value.dtype == tensor.dtype
        assert value.is_contiguous()
        assert not value.requires_grad


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=3)
    (tmp_path / "step_00000001.safetensors.partial").write_bytes(b"left by a kill")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.remove_leftovers()
    for step in (2, 99_999_999, 100_000_000, 7, 50):
        checkpoints.save(make_checkpoint(step))
    names = [path.name for path in checkpoints.paths()]
    assert names == ["step_00000050.safetensors", "step_99999999.safetensors", "step_100000000.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "notes.txt"}


def test_a_file_that_another_process_has_removed_is_none_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def second(path: Path, missing_ok: bool = False) -> None:
        unlink(path)
        unlink(path, missing_ok=missing_ok)

    checkpoints = Checkpoints(str(tmp_path), keep=1)
    checkpoints.save(make_checkpoint(1))
    monkeypatch.setattr(Path, "unlink", second)
    checkpoints.save(make_checkpoint(2))
    assert [path.name for path in checkpoints.paths()] == ["step_00000002.safetensors"]


def test_files_hold_no_pickle(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(make_checkpoint())
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
    state = json.loads(texts["state"])
    assert state["step"] == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["save_file", "_flush_to_disk"])
def test_a_failed_write_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "hparams.safetensors"
    save_hparams(path, {"x": torch.zeros(2)})

    def fail(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, failing, fail)
    with pytest.raises(CheckpointError, match=r"could not be written \(.*No space left on device\): the disk is full"):
        save_hparams(path, {"x": torch.ones(2)})
    assert load_hparams(path)["x"].tolist() == [0.0, 0.0]


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hparams.safetensors"
    seen: list[tuple[str, bool]] = []
    original = tensor_files._flush_to_disk

    def watching(flushed: Path) -> None:
        seen.append((flushed.name, path.exists()))
        original(flushed)

    monkeypatch.setattr(tensor_files, "_flush_to_disk", watching)
    save_hparams(path, {"x": torch.zeros(2)})
    assert seen == [("hparams.safetensors.partial", False), (tmp_path.name, True)]


# Damage


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_checkpoint(2))
    path = checkpoints.save(make_checkpoint(3))
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        message = r"step_00000003.safetensors` cannot be read .*Delete this file; .*resumes from `step_00000002"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(path)
    path.write_bytes(whole)
    assert checkpoints.load(path).step == 3


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(make_checkpoint(3))
    whole = path.read_bytes()
    for position in [*range(0, len(whole), 9), len(whole) - 1]:
        if chr(whole[position]).isspace():  # padding of the header
            continue
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"Delete this file; the run then resumes from the start"):
            checkpoints.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = tmp_path / "step_00000001.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"holds no checksum: it was not written by hypertorch. Delete this file"):
        checkpoints.load(path)
    save_hparams(path, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"is of format 'hypertorch.hparams', not a checkpoint of a run"):
        checkpoints.load(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.safetensors"
    texts = {"format": "hypertorch.checkpoint", "version": "0", "state": "{}"}
    tensor_files.write_tensor_file(path, {"x": torch.zeros(1)}, texts)
    with pytest.raises(CheckpointError, match=r"is a checkpoint of version '0'; this release .* reads version '2'"):
        Checkpoints(tmp_path).load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step_1.safetensors` cannot be read"):
        Checkpoints(tmp_path).load(tmp_path / "step_1.safetensors")


@pytest.mark.parametrize("name", ["every", "keep"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_refused_settings(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` of `Checkpoints` is {value}"):
        Checkpoints(tmp_path, **{name: value})


# Trained outer variables


def test_hparams_come_back_in_order(tmp_path: Path) -> None:
    hparams = {"z": torch.ones(2), "a": torch.tensor(3.0), "line\nbreak": torch.zeros(1)}
    save_hparams(tmp_path / "sub" / "hparams.safetensors", hparams)
    for path in (tmp_path / "sub", str(tmp_path / "sub" / "hparams.safetensors")):
        again = load_hparams(path, device="cpu")
        assert list(again) == list(hparams)
        assert all(torch.equal(again[name], hparams[name]) for name in hparams)


def test_a_checkpoint_gives_its_best_hparams(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(make_checkpoint())
    assert load_hparams(path)["z"].tolist() == [0.0, 0.0, 0.0]
    path = Checkpoints(tmp_path).save(make_checkpoint(best_hparams={}))
    assert load_hparams(path)["z"].tolist() == [0.0, 1.0, 2.0]


def test_an_unfinished_run_has_no_hparams_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file: a run writes .*Finish the run with `resume=True`"):
        load_hparams(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outer_variables_that_are_no_numbers_are_not_loaded(value: float, tmp_path: Path) -> None:
    path = tmp_path / "hparams.safetensors"
    save_hparams(path, {"fine": torch.ones(2), "weights": torch.tensor([1.0, value])})
    with pytest.raises(
        NonFiniteError, match=r"`hparams\['weights'\]` holds NaN or infinity in '.*hparams.safetensors'"
    ):
        load_hparams(path)


@pytest.mark.parametrize(
    "state",
    [
        "nothing",
        "[]",
        "{}",
        '{"order": {"hparams": ["gone"]}}',
        '{"order": {"hparams": [], "best_hparams": [], "carry": []}}',
        '{"order": 3}',
        "[" * 9999,
    ],
)
def test_a_foreign_header_with_a_right_checksum_is_refused(state: str, tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.safetensors"
    texts = {"format": "hypertorch.checkpoint", "version": "2", "state": state}
    tensor_files.write_tensor_file(path, {"x": torch.ones(1)}, texts)
    with pytest.raises(CheckpointError, match="has a header that no run writes.*was altered"):
        load_hparams(path)


@pytest.mark.parametrize("order", ["nothing", '["gone"]', "3", "[" * 9999])
def test_foreign_names_with_a_right_checksum_are_refused(order: str, tmp_path: Path) -> None:
    path = tmp_path / "hparams.safetensors"
    tensor_files.write_tensor_file(path, {"x": torch.ones(1)}, {"format": "hypertorch.hparams", "order": order})
    with pytest.raises(CheckpointError, match=r"has a header that `save_hparams` never writes.*was altered"):
        load_hparams(path)
