"""CIFAR-FS from each of its layouts, the split, and what is said about files that are not it."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from hypertorch.errors import DatasetError
from hypertorch.fewshot import CIFARFS
from hypertorch.fewshot.datasets import cifar_fs
from hypertorch.fewshot.datasets.cifar100_files import read_cifar100
from hypertorch.fewshot.datasets.cifar_fs_classes import CIFAR_FS_CLASSES
from tests.helpers.data import real_data

NAMES = ("apple", "train", "worm")


def images_of(position: int, count: int) -> np.ndarray:
    """Distinct images: the colour says which class, one pixel says which image."""
    images = np.full((count, 3, 32, 32), 10 * position, dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count) % 256
    images[:, 1, 0, 0] = np.arange(count) // 256
    return images


@pytest.fixture(scope="module")
def pickles() -> dict[str, bytes]:
    parts: dict[str, bytes] = {"meta": pickle.dumps({"fine_label_names": list(NAMES)}, protocol=2)}
    for part, start, stop in (("train", 0, 500), ("test", 500, 600)):
        data = np.concatenate([images_of(label, 600)[start:stop].reshape(-1, 3072) for label in range(3)])
        labels = [label for label in range(3) for _ in range(stop - start)]
        order = np.random.default_rng(0).permutation(len(labels))
        stable = sorted(order, key=lambda i: (i % 7, i))  # mixes the classes and keeps each in order
        stable = sorted(stable, key=lambda i: i % (stop - start))
        content = {"data": data[stable], "fine_labels": [labels[i] for i in stable]}
        parts[part] = pickle.dumps(content, protocol=2)
    return parts


def test_the_archive_packed_and_unpacked(tmp_path: Path, pickles: dict[str, bytes]) -> None:
    folder = tmp_path / "unpacked" / "cifar-100-python"
    folder.mkdir(parents=True)
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "cifar-100-python.tar.gz", "w:gz") as archive:
        for name, content in pickles.items():
            (folder / name).write_bytes(content)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for root in (packed, folder.parent):
        images = read_cifar100(root, ("train", "worm"))
        assert images.shape == (2, 600, 3, 32, 32) and images.dtype == np.uint8
        for position, found in zip((1, 2), images, strict=True):
            assert (found[:, 2] == 10 * position).all()
            assert set(map(tuple, found[:, :2, 0, 0])) == set(map(tuple, images_of(position, 600)[:, :2, 0, 0]))


class _OfPython2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, by which the published files hold their pixels."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def _save_bytes(self, content: bytes) -> None:
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(content)

    dispatch[bytes] = _save_bytes


def test_files_as_python_2_wrote_them(tmp_path: Path, pickles: dict[str, bytes]) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, content in pickles.items():
        with (folder / name).open("wb") as file:
            _OfPython2(file, protocol=2).dump(pickle.loads(content))
    content = (folder / "train").read_bytes()
    assert b"_codecs" not in content and max(content) > 127
    images = read_cifar100(tmp_path, ("worm",))
    assert np.array_equal(np.unique(images[0], axis=0), np.unique(images_of(2, 600), axis=0))


@pytest.mark.parametrize("spelling", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_arrays_of_every_numpy_are_read(tmp_path: Path, pickles: dict[str, bytes], spelling: bytes) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, content in pickles.items():
        (folder / name).write_bytes(
            content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray").replace(
                b"numpy.core.multiarray", spelling
            )
        )
    assert (folder / "train").read_bytes().count(spelling) == 1
    assert read_cifar100(tmp_path, ("worm",)).shape == (1, 600, 3, 32, 32)


def test_classes_that_the_archive_lacks_or_has_in_part_are_named(tmp_path: Path, pickles: dict[str, bytes]) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, content in pickles.items():
        (folder / name).write_bytes(content)
    with pytest.raises(DatasetError, match="'beaver' has 0 images instead of 600: it was changed or cut off"):
        read_cifar100(tmp_path, ("worm", "beaver"))
    part = pickle.loads(pickles["test"])
    content = {"data": part["data"][1:], "fine_labels": part["fine_labels"][1:]}
    (folder / "test").write_bytes(pickle.dumps(content, protocol=2))
    cut = NAMES[part["fine_labels"][0]]
    with pytest.raises(DatasetError, match=f"{cut!r} has 599 images instead of 600"):
        read_cifar100(tmp_path, NAMES)


def test_a_manipulated_pickle_runs_nothing(tmp_path: Path, pickles: dict[str, bytes]) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, content in pickles.items():
        (folder / name).write_bytes(content)
    victim = tmp_path / "victim"

    class Attack:
        def __reduce__(self) -> tuple:
            return Path.touch, (victim,)

    (folder / "meta").write_bytes(pickle.dumps(Attack(), protocol=2))
    with pytest.raises(DatasetError, match=r"which cannot be read as CIFAR-100 \(it asks for `.*manipulated"):
        read_cifar100(tmp_path, NAMES)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read .*No such file"),
        (b"", "empty file: its copying was cut off"),
        (b"\x80\x02}", "cannot be read as CIFAR-100 .*pickle exhausted"),
        (b"\x80\xff.", "cannot be read as CIFAR-100 .*unsupported pickle protocol"),
    ],
)
def test_a_damaged_pickle_is_said(tmp_path: Path, pickles: dict[str, bytes], content: bytes | None, why: str) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, whole in pickles.items():
        (folder / name).write_bytes(whole)
    (folder / "test").unlink()
    if content is not None:
        (folder / "test").write_bytes(content)
    with pytest.raises(DatasetError, match=why):
        read_cifar100(tmp_path, NAMES)


@pytest.mark.parametrize("members", [None, (), ("train",)])
def test_a_damaged_archive_is_said(tmp_path: Path, pickles: dict[str, bytes], members: tuple[str, ...] | None) -> None:
    path = tmp_path / "cifar-100-python.tar.gz"
    if members is None:
        path.write_bytes(b"no archive")
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name in members:
                member = tarfile.TarInfo(f"cifar-100-python/{name}")
                member.size = len(pickles[name])
                archive.addfile(member, io.BytesIO(pickles[name]))
    with pytest.raises(DatasetError, match="cannot be read as CIFAR-100 "):
        read_cifar100(tmp_path, NAMES)


def test_a_mosaic_per_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes").mkdir()
    for position, name in enumerate(NAMES):
        tiles = images_of(position, 600).transpose(0, 2, 3, 1).reshape(24, 25, 32, 32, 3)
        Image.fromarray(tiles.swapaxes(1, 2).reshape(768, 800, 3)).save(tmp_path / "classes" / f"{name}.png")
    images = read_cifar100(tmp_path, NAMES, cache_dir=tmp_path / "cache")
    assert capsys.readouterr() == ("", "")
    read_cifar100(tmp_path, NAMES[:1], cache_dir=tmp_path / "cache", progress=True)
    assert "Decoding CIFAR-100" in capsys.readouterr().out
    for position in range(3):
        assert np.array_equal(images[position], images_of(position, 600))
    assert np.array_equal(read_cifar100(tmp_path, NAMES, cache_dir=tmp_path / "cache"), images)
    Image.new("RGB", (800, 700)).save(tmp_path / "classes" / "worm.png")
    with pytest.raises(DatasetError, match=r"instead of \(768, 800, 3\): it is no mosaic of 24 x 25"):
        read_cifar100(tmp_path, NAMES, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("split_in_parts", [False, True])
def test_folders_of_classes(tmp_path: Path, split_in_parts: bool) -> None:
    for position, name in enumerate(NAMES):
        for number, image in enumerate(images_of(position, 600)):
            part = ("train" if number < 500 else "test") if split_in_parts else ""
            path = tmp_path / part / name / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path)
    images = read_cifar100(tmp_path, NAMES, cache_dir=tmp_path / "cache")
    for position in range(3):
        assert np.array_equal(images[position], images_of(position, 600))
    next(iter((tmp_path / ("test" if split_in_parts else "") / "worm").glob("*.png"))).unlink()
    with pytest.raises(DatasetError, match="'worm' has 599 images instead of 600"):
        read_cifar100(tmp_path, NAMES, cache_dir=tmp_path / "cache")


def test_the_splits_are_disjoint_and_complete() -> None:
    sizes = {split: len(names) for split, names in CIFAR_FS_CLASSES.items()}
    assert sizes == {"meta_train": 64, "meta_val": 16, "meta_test": 20}
    every = [name for names in CIFAR_FS_CLASSES.values() for name in names]
    assert len(set(every)) == 100 and "train" in CIFAR_FS_CLASSES["meta_train"]


@pytest.mark.parametrize("below", ["", "cifar100"])
def test_a_split_is_the_images_of_its_classes(tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def read(root: Path, classes: list[str], **options: Any) -> np.ndarray:
        asked.append((root, classes, options))
        return np.arange(len(classes) * 600 * 3 * 2 * 2, dtype=np.uint8).reshape(len(classes), 600, 3, 2, 2)

    monkeypatch.setattr(cifar_fs, "read_cifar100", read)
    (tmp_path / below).mkdir(exist_ok=True)
    dataset = CIFARFS(tmp_path, split="meta_val+meta_test", cache_dir=tmp_path / "cache", progress=True)
    names = [*CIFAR_FS_CLASSES["meta_val"], *CIFAR_FS_CLASSES["meta_test"]]
    assert asked == [(tmp_path / below, names, {"cache_dir": tmp_path / "cache", "progress": True})]
    assert dataset.class_names == tuple(names) and dataset.counts == (600,) * 36
    assert dataset.images.shape == (36 * 600, 3, 2, 2)
    assert np.array_equal(dataset.images.reshape(36, 600, 3, 2, 2), read(tmp_path, names))
    assert repr(dataset).startswith("CIFARFS(split='meta_val+meta_test', classes=36, images=21600")
    CIFARFS(tmp_path, split="meta_val")
    assert asked[-1][2] == {"cache_dir": None, "progress": False}


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERTORCH_DATA", raising=False)
    with pytest.raises(DatasetError, match="`root` is not given, and HYPERTORCH_DATA is not set"):
        CIFARFS(split="meta_test")
    with pytest.raises(DatasetError, match=r"lacks the classes \['baby'.*20 of 20 wanted.*official archive"):
        CIFARFS(tmp_path, split="meta_test")
    with pytest.raises(ValueError, match="`split` is 'test', which names no split"):
        CIFARFS(tmp_path, split="test")


@pytest.mark.data
def test_real_cifar_fs() -> None:
    dataset = CIFARFS(real_data("cifar100"), split="meta_test")
    assert dataset.num_classes == 20 and dataset.item_shape == (3, 32, 32)
    assert set(dataset.counts) == {600} and len(dataset.images) == 12_000
    assert 90 < dataset.images.to(torch.float64).mean() < 150
