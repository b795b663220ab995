import os

import numpy as np
import pytest
from PIL import Image

from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets import omniglot_files
from hypertorch.fewshot.datasets.omniglot_files import read_part
from tests.helpers.omniglot import SMALL_BACKGROUND, broken_png, ink, official_files, png, write_archive, write_folders

FIRST = "images_background/Armenian/character01/0001_01.png"


def read(root, **changes):
    return read_part(root, SMALL_BACKGROUND, **({"image_size": 15, "cache_dir": root / "cache"} | changes))


@pytest.mark.parametrize("write", [write_archive, write_folders])
def test_every_drawing_lands_in_its_place(tmp_path, write):
    write(tmp_path, SMALL_BACKGROUND)
    images = read(tmp_path)
    assert images.shape == (5, 4, 15, 15)
    assert images.dtype == np.uint8
    for position in range(5):
        for drawing in range(4):
            np.testing.assert_array_equal(images[position, drawing], ink(position, drawing))


def test_scaling_is_lanczos_of_white_ink(tmp_path):
    write_archive(tmp_path, SMALL_BACKGROUND)
    expected = Image.fromarray(ink(2, 3)).resize((6, 6), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(read(tmp_path, image_size=6)[2, 3], np.asarray(expected))


def test_the_archive_is_preferred_to_the_folders(tmp_path):
    folder = write_folders(tmp_path, SMALL_BACKGROUND)
    (folder / "Armenian/character01/0001_01.png").write_bytes(b"broken")
    write_archive(tmp_path, SMALL_BACKGROUND)
    assert read(tmp_path).shape == (5, 4, 15, 15)


def test_what_macos_adds_is_passed_over(tmp_path):
    files = official_files(SMALL_BACKGROUND)
    files |= {f"__MACOSX/{FIRST}": b"", "images_background/Armenian/character01/._0001_01.png": b""}
    write_archive(tmp_path, SMALL_BACKGROUND, files)
    assert read(tmp_path).shape == (5, 4, 15, 15)


def test_the_cache_is_used(tmp_path, monkeypatch):
    write_archive(tmp_path, SMALL_BACKGROUND)
    first = read(tmp_path)
    monkeypatch.setattr(omniglot_files, "_decode", None)
    np.testing.assert_array_equal(read(tmp_path), first)
    with pytest.raises(TypeError):  # another size is not in the cache
        read(tmp_path, image_size=14)


def test_a_changed_archive_is_read_anew(tmp_path):
    path = write_archive(tmp_path, SMALL_BACKGROUND)
    before = path.stat()
    read(tmp_path)
    files = official_files(SMALL_BACKGROUND)
    second = FIRST.replace("_01.png", "_02.png")
    files[FIRST], files[second] = files[second], files[FIRST]
    write_archive(tmp_path, SMALL_BACKGROUND, files)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    np.testing.assert_array_equal(read(tmp_path)[0, 0], ink(0, 1))


def test_a_changed_folder_is_read_anew(tmp_path):
    folder = write_folders(tmp_path, SMALL_BACKGROUND)
    read(tmp_path)
    changed = folder / "Greek/character03/0005_04.png"
    changed.write_bytes(png(ink(0, 0)))
    os.utime(changed, ns=(1, 1))
    np.testing.assert_array_equal(read(tmp_path)[4, 3], ink(0, 0))


def test_a_corrupt_cache_is_made_again(tmp_path):
    write_archive(tmp_path, SMALL_BACKGROUND)
    expected = read(tmp_path)
    (cached,) = (tmp_path / "cache").iterdir()
    content = bytearray(cached.read_bytes())
    content[-5] ^= 255
    cached.write_bytes(content)
    np.testing.assert_array_equal(read(tmp_path), expected)


def test_progress_is_shown_only_when_asked(tmp_path, capsys):
    write_archive(tmp_path, SMALL_BACKGROUND)
    read(tmp_path)
    assert capsys.readouterr() == ("", "")
    read(tmp_path, progress=True, image_size=14)
    assert "Decoding images_background" in capsys.readouterr().out


def test_missing_data(tmp_path):
    message = r"`root` is '.*', which has neither 'images_background.zip' nor the folder 'images_background': .*"
    with pytest.raises(DatasetError, match=message + r"scripts/download_data.*dataset.root=.*HYPERTORCH_DATA"):
        read(tmp_path)
    with pytest.raises(DatasetError, match=r"nowhere', which does not exist, so there is neither"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 10, 600, -1])
def test_a_truncated_archive(tmp_path, kept):
    path = write_archive(tmp_path, SMALL_BACKGROUND)
    path.write_bytes(path.read_bytes()[:kept])
    message = r"`root` has '.*images_background.zip' \(\d+ bytes\), which is no complete zip archive.*Delete it"
    with pytest.raises(DatasetError, match=message):
        read(tmp_path)


def test_damaged_bytes_inside_an_archive(tmp_path):
    path = write_archive(tmp_path, SMALL_BACKGROUND)
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 6
    content[start : start + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"no complete zip archive \(Bad CRC-32"):
        read(tmp_path)


def changed_archive(root, change):
    files = official_files(SMALL_BACKGROUND)
    change(files)
    write_archive(root, SMALL_BACKGROUND, files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda files: files.pop(FIRST),
            r"'images_background/Armenian/character01' has 3 drawings instead of 4: .*Delete",
        ),
        (
            lambda files: [files.pop(name) for name in list(files) if "Greek/character02" in name],
            r"'images_background/Greek/character02' has 0 drawings instead of 4: the copy is incomplete",
        ),
        (
            lambda files: files.update({"images_background/Klingon/character01/0001_01.png": b""}),
            r"'images_background/Klingon/character01/0001_01.png', which is not of Omniglot: .*2 alphabets with 5 char",
        ),
        (
            lambda files: files.update({FIRST.replace("_01.png", "_05.png"): files[FIRST]}),
            r"character01' has 5 drawings instead of 4",
        ),
        (lambda files: files.update({FIRST: b"no picture"}), r"0001_01.png', which is no readable image.*damaged"),
        (lambda files: files.update({FIRST: files[FIRST][:60]}), r"0001_01.png', which is no readable image"),
        (lambda files: files.update({FIRST: broken_png()}), r"no readable image \(broken PNG file"),
        (
            lambda files: files.update({FIRST: png(np.zeros((9, 7), dtype=np.uint8))}),
            r"0001_01.png' of 7 x 9 pixels instead of 15 x 15: these are not the official drawings.*`image_size`",
        ),
    ],
)
def test_contents_are_checked(tmp_path, change, message):
    changed_archive(tmp_path, change)
    with pytest.raises(DatasetError, match=message):
        read(tmp_path)
    assert not (tmp_path / "cache").exists()


def test_contents_of_folders_are_checked(tmp_path):
    folder = write_folders(tmp_path, SMALL_BACKGROUND)
    (folder / "Greek/character01/0003_02.png").unlink()
    with pytest.raises(DatasetError, match=r"'images_background/Greek/character01' has 3 drawings instead of 4"):
        read(tmp_path)
