"""A bar is shown while a data set is made if it is asked for, and the cache lies where it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from hypertorch.fewshot import ImageFolder, StrokeCharacters


def folder(root: Path, *, progress: bool, cache: str) -> None:
    for name in ("one", "two"):
        (root / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / "data" / name / "image.png")
    ImageFolder(root / "data", image_size=8, cache_dir=root / cache, progress=progress)


def strokes(root: Path, *, progress: bool, cache: str) -> None:
    StrokeCharacters(
        split="meta_train", num_classes=2, drawings=1, image_size=8, cache_dir=root / cache, progress=progress
    )


@pytest.mark.parametrize(("make", "title"), [(folder, "Decoding"), (strokes, "Drawing meta_train")])
def test_a_bar_is_shown_only_when_asked(make, title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, progress=False, cache="first")
    assert capsys.readouterr() == ("", "")
    assert len(list((tmp_path / "first").iterdir())) == 1
    make(tmp_path, progress=True, cache="second")
    assert title in capsys.readouterr().out
