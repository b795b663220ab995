"""Class folders and mini-ImageNet's layouts, from files made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypertorch.errors import DatasetError
from hypertorch.fewshot import ImageFolder, MiniImageNet


def save(path: Path, grey: int, size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def class_folders(root: Path, names: str = "ba", count: int = 3) -> None:
    for position, name in enumerate(names):
        for number in range(count):
            save(root / name / f"{number}.png", 40 * position + number)


def test_classes_and_images_in_alphabetical_order(tmp_path: Path) -> None:
    class_folders(tmp_path / "data")
    (tmp_path / "data" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "data" / ".hidden").mkdir()
    classes = ImageFolder(tmp_path / "data", image_size=8, cache_dir=tmp_path / "cache")
    assert classes.class_names == ("a", "b") and classes.counts == (3, 3)
    assert classes.images.shape == (6, 3, 8, 8)
    assert classes.images[:, 0, 4, 4].tolist() == [40, 41, 42, 0, 1, 2]
    grey = ImageFolder(tmp_path / "data", image_size=4, channels=1, classes=["b"], cache_dir=tmp_path / "cache")
    assert grey.class_names == ("b",) and grey.item_shape == (1, 4, 4)


def test_wide_images_are_cropped_and_not_squeezed(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "data" / "a" / "wide.png")
    classes = ImageFolder(tmp_path / "data", image_size=8, cache_dir=tmp_path / "cache")
    assert (classes.images == 200).all()


def test_splits_are_folders(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("meta_val", "de"), ("test", "fg")):
        class_folders(tmp_path / "data" / split, names)
    root, options = tmp_path / "data", {"image_size": 4, "cache_dir": tmp_path / "cache"}
    assert ImageFolder(root, split="meta_train", **options).class_names == tuple("abc")
    assert ImageFolder(root, split="meta_train+meta_val", **options).class_names == tuple("abcde")
    assert MiniImageNet(root, split="meta_test", **options).class_names == tuple("fg")


@pytest.mark.parametrize("place", ["images", "", "{label}"])
def test_split_files(tmp_path: Path, place: str) -> None:
    root = tmp_path / "mini_imagenet"
    for split, labels in (("train", "ab"), ("val", "c"), ("test", "d")):
        rows = []
        for position, label in enumerate(labels):
            for number in range(2):
                save(root / place.format(label=label) / f"{label}{number}.jpg", 100 * position)
                rows.append(f"{label}{number}.jpg,{label}")
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *reversed(rows)]))
    classes = MiniImageNet(tmp_path, split="meta_train", image_size=8, cache_dir=tmp_path / "cache")
    assert classes.class_names == ("a", "b") and classes.counts == (2, 2)
    assert classes.images[:, 0, 0, 0].tolist() == [0, 0, 100, 100]
    (root / place.format(label="c") / "c1.jpg").unlink()
    with pytest.raises(DatasetError, match="whose split files name 'c1.jpg'"):
        MiniImageNet(tmp_path, split="meta_val", cache_dir=tmp_path / "cache")


def test_mistakes_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERTORCH_DATA", raising=False)
    with pytest.raises(DatasetError, match="which is no folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="without a subfolder: each class is a folder"):
        ImageFolder(tmp_path)
    class_folders(tmp_path / "data")
    with pytest.raises(ValueError, match="`split` is 'meta_tset', which names no split"):
        ImageFolder(tmp_path / "data", split="meta_tset")
    with pytest.raises(DatasetError, match="has no folder 'meta_test' or 'test'"):
        ImageFolder(tmp_path / "data", split="meta_test")
    with pytest.raises(DatasetError, match=r"lacks the classes \['z'\]"):
        ImageFolder(tmp_path / "data", classes=["z"])
    with pytest.raises(ValueError, match="`channels` is 2"):
        ImageFolder(tmp_path / "data", channels=2)
    (tmp_path / "data" / "a" / "0.png").write_bytes(b"no png")
    with pytest.raises(DatasetError, match=r"0.png' is no readable image"):
        ImageFolder(tmp_path / "data", cache_dir=tmp_path / "cache")
    (tmp_path / "data" / "empty").mkdir()
    with pytest.raises(DatasetError, match="class folder .*empty' without an image"):
        ImageFolder(tmp_path / "data")
    with pytest.raises(DatasetError, match="mini-ImageNet is not found"):
        MiniImageNet(split="meta_test")
    (tmp_path / "train.csv").write_text("file,class\n")
    with pytest.raises(DatasetError, match=r"columns \['file', 'class'\]: `filename` and `label` are needed"):
        MiniImageNet(tmp_path, split="meta_train")
