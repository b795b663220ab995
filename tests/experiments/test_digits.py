"""Digits for experiments: sets of images that do not overlap, and files that are refused by name."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets.digits import digit_splits


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images of 2 x 2 pixels, each filled with its own number; the label is that number modulo 10."""
    for part, numbers in (("train", np.arange(5)), ("t10k", np.arange(5, 8))):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", np.repeat(numbers, 4).reshape(-1, 2, 2))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", numbers)
    return tmp_path


def test_embedded_digits_are_split_without_overlap() -> None:
    splits = digit_splits("digits", {"train": 500, "validation": 300, "test": 0}, dtype=torch.float64, seed=3)
    assert {name: len(images) for name, images in splits.items()} == {"train": 500, "validation": 300, "test": 997}
    pixels, digits = load_digits(return_X_y=True)
    found = torch.cat([images.inputs for images in splits.values()]) * 16
    labels = torch.cat([images.labels for images in splits.values()])
    order = sorted((*row, label) for row, label in zip(found.tolist(), labels.tolist(), strict=True))
    assert order == sorted((*row, digit) for row, digit in zip(pixels.tolist(), digits.tolist(), strict=True))
    assert splits["train"].side == 8


def test_a_seed_draws_its_own_sets() -> None:
    first, again, other = (digit_splits("digits", {"train": 50}, seed=seed)["train"] for seed in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)


def test_files_of_mnist_are_read(root: Path) -> None:
    images = digit_splits("mnist", {"all": 8}, root=root, dtype=torch.float64)["all"]
    assert torch.equal(images.inputs, images.labels[:, None].double().expand(8, 4) / 255)
    assert images.labels.sort().values.tolist() == list(range(8))


def test_what_cannot_be_read_is_named(root: Path) -> None:
    def refused(message: str, **arguments: object) -> None:
        with pytest.raises(ExpectedFailure, match=message):
            digit_splits(**{"name": "mnist", "sizes": {"train": 4}, "root": root, **arguments})  # type: ignore[arg-type]

    refused("asks for 9 images .9 train.*has 8", sizes={"train": 9})
    refused("asks for 8 images .8 train, 0 test, and the rest.*has 8", sizes={"train": 8, "test": 0})
    refused("asks for 0 train, 0 test images: .* one set alone", sizes={"train": 0, "test": 0})
    refused("asks for -1 train images: a size is at least 0", sizes={"train": -1})
    refused("`experiment.root` is null", root=None)
    refused("`experiment.data` is 'mnits', which names no images", name="mnits")
    refused("need no folder", name="digits")
    refused("train-images-idx3-ubyte.gz cannot be read there", root=root / "elsewhere")
    write_idx(root / "t10k-labels-idx1-ubyte.gz", np.arange(2))
    refused("8 images and 7 labels")
    whole = gzip.decompress((root / "t10k-images-idx3-ubyte.gz").read_bytes())
    for broken in (whole[:-1], whole[:6], b"", b"\1" + whole[1:]):
        (root / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(broken))
        refused("is no IDX file of bytes")
    (root / "t10k-images-idx3-ubyte.gz").write_bytes(b"no archive")
    refused("cannot be read there")
