"""Class folders and mini-ImageNet's layouts, from files made here."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypertorch.errors import DatasetError
from hypertorch.fewshot import ImageClasses, ImageFolder, MiniImageNet
from hypertorch.fewshot.datasets.image_files import open_image
from tests.helpers.omniglot import broken_png


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


def test_high_images_are_cropped_too(tmp_path: Path) -> None:
    high = np.zeros((24, 8), dtype=np.uint8)
    high[8:16] = 200
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(high).save(tmp_path / "data" / "a" / "high.png")
    classes = ImageFolder(tmp_path / "data", image_size=8, cache_dir=tmp_path / "cache")
    assert (classes.images == 200).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_are_scaled_to_8(tmp_path: Path, channels: int) -> None:
    levels = np.array([[0, 257], [128 * 257, 65535]], dtype=np.uint16)
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(levels).save(tmp_path / "data" / "a" / "deep.png")
    options = {"channels": channels, "cache_dir": tmp_path / "cache"}
    classes = ImageFolder(tmp_path / "data", image_size=2, **options)
    assert classes.images[0].tolist() == [[[0, 1], [128, 255]]] * channels


def test_every_level_of_16_bits_goes_to_the_nearest_of_8(tmp_path: Path) -> None:
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(levels).save(tmp_path / "data" / "a" / "deep.png")
    classes = ImageFolder(tmp_path / "data", image_size=256, channels=1, cache_dir=tmp_path / "cache")
    assert np.array_equal(classes.images[0, 0].numpy(), np.rint(levels / 257))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(tmp_path: Path, mode: str, channels: int) -> None:
    opacity = np.array([[255, 0], [0, 255]], dtype=np.uint8)  # black ink on nothing
    ink = Image.merge("LA", (Image.new("L", (2, 2)), Image.fromarray(opacity)))
    options: dict[str, int] = {}
    if mode == "P":
        ink = Image.fromarray((opacity == 0).astype(np.uint8))
        ink.putpalette([0, 0, 0] * 256)
        options["transparency"] = 1
    elif mode == "RGBA":
        ink = ink.convert("RGBA")
    (tmp_path / "data" / "a").mkdir(parents=True)
    ink.save(tmp_path / "data" / "a" / "ink.png", **options)
    classes = ImageFolder(tmp_path / "data", image_size=2, channels=channels, cache_dir=tmp_path / "cache")
    assert classes.images[0].tolist() == [[[0, 255], [255, 0]]] * channels


def test_photographs_are_turned_as_the_camera_was_held(tmp_path: Path) -> None:
    pixels = np.array([[0, 50], [100, 150]], dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # the top is on the right: to be turned by 90 degrees clockwise
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "data" / "a" / "photo.png", exif=turned)
    classes = ImageFolder(tmp_path / "data", image_size=2, channels=1, cache_dir=tmp_path / "cache")
    assert classes.images[0, 0].tolist() == [[100, 0], [150, 50]]


def test_a_link_to_nothing_and_classes_that_are_no_list_are_explained(tmp_path: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.new("L", (2, 2)).save(tmp_path / "data" / "a" / "one.png")
    for classes in ("a", ["a", "a"]):
        with pytest.raises(ValueError, match="`classes` is .*names of classes, each once"):
            ImageFolder(tmp_path / "data", image_size=2, classes=classes, cache_dir=tmp_path / "cache")
    (tmp_path / "data" / "a" / "two.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DatasetError, match="two.png', which cannot be read .* is a link to a file that is gone"):
        ImageFolder(tmp_path / "data", image_size=2, cache_dir=tmp_path / "cache")


def pixels(size: int = 4, mode: str = "L") -> Image.Image:
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(image).convert(mode)


@pytest.mark.parametrize("suffix", ["png", "PNG", "tif", "TIFF", "gif", "pgm", "ppm", "bmp", "webp", "jp2", "tga"])
def test_what_pillow_reads_is_an_image(tmp_path: Path, suffix: str) -> None:
    """Formats without loss give the pixels that were written, beside PNG in the same folder."""
    lossless = {"webp": {"lossless": True}}
    (tmp_path / "data" / "a").mkdir(parents=True)
    pixels().save(tmp_path / "data" / "a" / "0.png")
    mode = "RGB" if suffix == "ppm" else "L"
    pixels(mode="L").convert(mode).save(tmp_path / "data" / "a" / f"1.{suffix}", **lossless.get(suffix, {}))
    classes = ImageFolder(tmp_path / "data", image_size=4, channels=1, cache_dir=tmp_path / "cache")
    assert classes.counts == (2,)
    assert np.array_equal(classes.images[1, 0], np.asarray(pixels()))
    assert np.array_equal(classes.images[0], classes.images[1])


def test_of_several_frames_the_first_is_taken(tmp_path: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    frames = [Image.new("L", (4, 4), grey) for grey in (40, 200)]
    for name in ("film.gif", "pages.tif"):
        frames[0].save(tmp_path / "data" / "a" / name, save_all=True, append_images=frames[1:])
    classes = ImageFolder(tmp_path / "data", image_size=4, channels=1, cache_dir=tmp_path / "cache")
    assert classes.images.unique().tolist() == [40]


def test_tiffs_of_16_bits_are_scaled_too(tmp_path: Path) -> None:
    levels = np.array([[0, 257], [128 * 257, 65535]], dtype=np.uint16)
    (tmp_path / "data" / "a").mkdir(parents=True)
    for name in ("deep.tif", "deep.pgm"):
        Image.fromarray(levels).save(tmp_path / "data" / "a" / name)
    classes = ImageFolder(tmp_path / "data", image_size=2, channels=1, cache_dir=tmp_path / "cache")
    assert classes.images.tolist() == [[[[0, 1], [128, 255]]]] * 2


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_brightness_are_refused(tmp_path: Path, dtype: type) -> None:
    """Values in [0, 1] would be cut to black, and those of 8 bits taken for nearly black ones of 16."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(np.ones((2, 2), dtype=dtype)).save(tmp_path / "data" / "a" / "wide.tif")
    with pytest.raises(DatasetError, match=r"wide.tif' is no readable image \(32 bits per pixel, of which none says"):
        ImageFolder(tmp_path / "data", image_size=2, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "suffix", ["txt", "md", "csv", "tsv", "json", "xml", "yaml", "yml", "html", "ini", "db", "TXT"]
)
def test_notes_and_tables_beside_images_are_passed_over(tmp_path: Path, suffix: str) -> None:
    class_folders(tmp_path / "data", "a")
    (tmp_path / "data" / "a" / f"beside.{suffix}").write_text("beside")
    assert ImageFolder(tmp_path / "data", image_size=4, cache_dir=tmp_path / "cache").counts == (3,)


@pytest.mark.parametrize("suffix", ["bufr", "eps", "ps", "grib", "h5", "hdf", "mpg", "mpeg", "wmf", "emf"])
def test_formats_that_pillow_only_recognises_are_no_images(tmp_path: Path, suffix: str) -> None:
    class_folders(tmp_path / "data", "a")
    (tmp_path / "data" / "a" / f"film.{suffix}").write_bytes(b"?")
    with pytest.warns(UserWarning, match=rf"1 entries are left out.*a/film\.{suffix}\. Convert"):
        assert ImageFolder(tmp_path / "data", image_size=4, cache_dir=tmp_path / "cache").counts == (3,)


def test_what_is_left_out_is_named_once(tmp_path: Path) -> None:
    class_folders(tmp_path / "data")
    for companion in ("notes.txt", "Thumbs.db", ".DS_Store", "boxes.xml", "desktop.ini"):
        (tmp_path / "data" / "a" / companion).write_text("beside")
    options: dict[str, Any] = {"image_size": 4, "cache_dir": tmp_path / "cache"}
    assert ImageFolder(tmp_path / "data", **options).counts == (3, 3)
    for missed in ("7.heic", "8.npy", "9"):
        (tmp_path / "data" / "b" / missed).write_bytes(b"?")
    class_folders(tmp_path / "data" / "a", "xyz", count=1)
    message = (
        r"class folders 6 entries are left out, which are .* suffix: a/x, a/y, a/z, b/7.heic, b/8.npy, \.\.\.\. "
        r"Convert those"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        classes = ImageFolder(tmp_path / "data", **options)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert classes.counts == (3, 3)
    with pytest.warns(UserWarning, match=r"3 entries are left out.*: b/7.heic, b/8.npy, b/9\. Convert"):
        ImageFolder(tmp_path / "data", classes=["b"], **options)


def test_folders_of_another_depth_are_explained(tmp_path: Path) -> None:
    class_folders(tmp_path / "deep" / "family", "ab")
    with pytest.raises(DatasetError, match=(
        r"class folder .*family' with the folders \['a', 'b'\] in it \(2 in all\) and no image .*one level deeper.*"
        r"`root='.*family'`"
    )):  # fmt: skip
        ImageFolder(tmp_path / "deep")
    save(tmp_path / "flat" / "one.png", 0)
    with pytest.raises(DatasetError, match=r"flat' without a subfolder, with 1 images in it.*one folder per class"):
        ImageFolder(tmp_path / "flat")
    (tmp_path / "other" / "a").mkdir(parents=True)
    (tmp_path / "other" / "a" / "film.mpg").write_bytes(b"?")
    with pytest.raises(DatasetError, match=r"class folder .*a' without an image \(it holds \['film.mpg'\]; PNG, JPEG"):
        ImageFolder(tmp_path / "other")


def test_an_empty_file_is_named_as_empty(tmp_path: Path) -> None:
    class_folders(tmp_path / "data")
    (tmp_path / "data" / "b" / "7.png").touch()
    with pytest.raises(DatasetError, match="7.png', which is an empty file: its copying was cut off"):
        ImageFolder(tmp_path / "data", cache_dir=tmp_path / "cache")


def test_splits_are_folders(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("meta_val", "de"), ("test", "fg")):
        class_folders(tmp_path / "data" / split, names)
    root, options = tmp_path / "data", {"image_size": 4, "cache_dir": tmp_path / "cache"}
    assert ImageFolder(root, split="meta_train", **options).class_names == tuple("abc")
    assert ImageFolder(root, split="meta_train+meta_val", **options).class_names == tuple("abcde")
    tests = MiniImageNet(root, split="meta_test", **options)
    assert tests.class_names == tuple("fg")
    assert repr(tests) == "MiniImageNet(split='meta_test', classes=2, images=6, item_shape=(3, 4, 4))"
    folders = ImageFolder(root, split="meta_test", **options)
    assert repr(folders) == "ImageFolder(split='meta_test', classes=2, images=6, item_shape=(3, 4, 4))"


@pytest.mark.parametrize(
    ("split", "folder"),
    [
        ("meta_train", "meta_train"), ("meta_train", "train"), ("meta_val", "meta_val"), ("meta_val", "val"),
        ("meta_val", "validation"), ("meta_test", "meta_test"), ("meta_test", "test"),
    ],
)  # fmt: skip
def test_a_split_has_a_folder_of_any_usual_name(tmp_path: Path, split: str, folder: str) -> None:
    class_folders(tmp_path / "data" / folder, "ab")
    found = ImageFolder(tmp_path / "data", split=split, image_size=4, cache_dir=tmp_path / "cache")
    assert found.class_names == ("a", "b")


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
    with pytest.raises(TypeError, match="`root` is None, a NoneType: it says where .*Pass the path"):
        ImageFolder(None)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="without a subfolder: each class is a folder"):
        ImageFolder(tmp_path)
    class_folders(tmp_path / "data")
    with pytest.raises(ValueError, match="`split` is 'meta_tset', which names no split"):
        ImageFolder(tmp_path / "data", split="meta_tset")
    with pytest.raises(ValueError, match="which names a split twice: .*Name each split once"):
        ImageFolder(tmp_path / "data", split="meta_val+meta_val")
    with pytest.raises(DatasetError, match="has no folder 'meta_test' or 'test'"):
        ImageFolder(tmp_path / "data", split="meta_test")
    with pytest.raises(DatasetError, match=r"lacks the classes \['z'\]"):
        ImageFolder(tmp_path / "data", classes=["z"])
    with pytest.raises(ValueError, match="`channels` is 2"):
        ImageFolder(tmp_path / "data", channels=2)
    for content in (b"no png", broken_png()):
        (tmp_path / "data" / "a" / "0.png").write_bytes(content)
        with pytest.raises(DatasetError, match=r"0.png' is no readable image"):
            ImageFolder(tmp_path / "data", cache_dir=tmp_path / "cache")
    (tmp_path / "data" / "empty").mkdir()
    with pytest.raises(DatasetError, match="class folder .*empty' without an image"):
        ImageFolder(tmp_path / "data")
    with pytest.raises(DatasetError, match="mini-ImageNet is not found"):
        MiniImageNet(split="meta_test")
    for columns in (["file", "class"], ["filename", "class"], ["file", "label"]):
        (tmp_path / "train.csv").write_text(",".join(columns) + "\n")
        with pytest.raises(DatasetError, match=r"columns \['file.*', .*\]: `filename` and `label` are needed"):
            MiniImageNet(tmp_path, split="meta_train")
    (tmp_path / "train.csv").write_text("\n")
    with pytest.raises(DatasetError, match=r"columns \[\]: `filename` and `label` are needed"):
        MiniImageNet(tmp_path, split="meta_train")


def split_files(root: Path, **labels: str) -> None:
    """Two images of each class, and one split file per keyword that names them."""
    for split, names in labels.items():
        rows = [f"{label}{number}.png,{label}" for label in names for number in range(2)]
        for row in rows:
            save(root / "images" / row.split(",")[0], 0)
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *rows]))


def mini(root: Path, split: str = "meta_train") -> ImageClasses:
    return MiniImageNet(root, split=split, image_size=4, cache_dir=root.parent / "cache")


def test_a_byte_order_mark_is_no_part_of_a_split_file(tmp_path: Path) -> None:
    split_files(tmp_path / "data", train="ab")
    path = tmp_path / "data" / "train.csv"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert mini(tmp_path / "data").class_names == ("a", "b")


def test_a_split_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    split_files(tmp_path / "data", train="ab")
    (tmp_path / "data" / "train.csv").write_bytes("filename,label\né.png,é".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"train.csv', which cannot be read as a table in UTF-8 .*Save it as CSV"):
        mini(tmp_path / "data")


def test_a_row_without_a_label_is_named(tmp_path: Path) -> None:
    split_files(tmp_path / "data", train="ab")
    with (tmp_path / "data" / "train.csv").open("a") as file:
        file.write("\nb7.png\n")
    with pytest.raises(DatasetError, match=r"train.csv', whose line 6 lacks a file name or a label"):
        mini(tmp_path / "data")


@pytest.mark.parametrize("again", ["a1.png,a", "a1.png,b", "../images/a1.png,a"])
def test_an_image_that_a_split_file_names_twice_is_refused(tmp_path: Path, again: str) -> None:
    split_files(tmp_path / "data", train="ab")
    with (tmp_path / "data" / "train.csv").open("a") as file:
        file.write(f"\n{again}\n")
    with pytest.raises(DatasetError, match=r"train.csv', whose line 6 names .*a1.png' .* after line 3: .*Remove one"):
        mini(tmp_path / "data")


@pytest.mark.parametrize("split", ["meta_train", "meta_test", "meta_train+meta_test", "meta_val"])
def test_a_class_in_two_splits_is_refused(tmp_path: Path, split: str) -> None:
    split_files(tmp_path / "lists", train="ab", val="c", test="db")
    with pytest.raises(DatasetError, match=r"class 'b' is in 'train.csv' and in 'test.csv': .*Remove it"):
        mini(tmp_path / "lists", split)
    for name, classes in (("train", "ab"), ("val", "c"), ("meta_test", "db")):
        class_folders(tmp_path / "folders" / name, classes)
    with pytest.raises(DatasetError, match=r"class 'b' is in 'train' and in 'meta_test': .*merge them and pass"):
        mini(tmp_path / "folders", split)


def test_what_mini_imagenet_lacks_is_said_for_both_layouts(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere', which is no folder: mini-ImageNet is not found there. Put `tr"):
        mini(tmp_path / "nowhere")
    split_files(tmp_path / "data", train="ab", test="d")
    with pytest.raises(
        DatasetError, match=r"has no 'val.csv' and no folder 'meta_val' or 'val' .*Put `train.csv`"
    ) as e:
        mini(tmp_path / "data", "meta_val")
    assert "split=None" not in str(e.value)
    class_folders(tmp_path / "data" / "val", "c")
    assert mini(tmp_path / "data", "meta_val").class_names == ("c",)
    with pytest.raises(DatasetError, match=r"has a folder for 'meta_val', but only a file for 'meta_train': "):
        mini(tmp_path / "data", "meta_train+meta_val")
    with pytest.raises(ValueError, match="which names a split twice"):
        mini(tmp_path / "data", "meta_train+meta_train")
    with pytest.raises(ValueError, match="`split` is None, which names no split"):
        MiniImageNet(tmp_path, split=None)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes a file name of any bytes")
def test_a_class_may_have_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    for name in ("a", os.fsdecode(b"\xff\xe9")):
        save(tmp_path / "data" / name / "0.png", 40)
    classes = ImageFolder(tmp_path / "data", image_size=8, cache_dir=tmp_path / "cache")
    assert len(classes.class_names) == 2 and classes.counts == (1, 1)


def tiff_of_grey(levels: np.ndarray, bits: int, *, white_is_zero: bool) -> bytes:
    """A TIFF file of one line of grey levels, as cameras and microscopes write them."""
    stream = np.array([[int(bit) for bit in f"{level:0{bits}b}"] for level in levels.tolist()], np.uint8).reshape(-1)
    line = np.packbits(stream).tobytes() if bits == 12 else levels.astype("<u2").tobytes()
    tags = [
        (256, 4, 1, len(levels)),
        (257, 4, 1, 1),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, 0 if white_is_zero else 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, 1),
        (279, 4, 1, len(line)),
    ]
    start = 8 + len(line) + len(line) % 2
    body = (
        line
        + bytes(len(line) % 2)
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    )
    return b"II*\0" + struct.pack("<I", start) + body + bytes(4)


@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, False), (16, True)])
def test_white_is_white_in_every_grey_tiff(bits: int, white_is_zero: bool, tmp_path: Path) -> None:
    levels = np.linspace(0, 2**bits - 1, 8).round().astype(np.int64)
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "x.tif").write_bytes(tiff_of_grey(levels, bits, white_is_zero=white_is_zero))
    found = np.asarray(open_image(tmp_path / "data" / "a" / "x.tif", "L"))[0]
    expected = (levels * 255 / (2**bits - 1)).round()
    assert np.abs(found - (255 - expected if white_is_zero else expected)).max() <= 1


# By mode and format: what is shown of a grey of 64, in the bright half of the picture 192.
MODES = {
    ("1", "PNG"): (0, 255),
    ("L", "PNG"): (64, 192),
    ("LA", "PNG"): (64, 192),
    ("P", "PNG"): (64, 192),
    ("P", "GIF"): (64, 192),
    ("RGB", "PNG"): (64, 192),
    ("RGBA", "PNG"): (64, 192),
    ("CMYK", "JPEG"): (64, 192),
    ("CMYK", "TIFF"): (64, 192),
    ("YCbCr", "TIFF"): (64, 192),
    ("I;16", "PNG"): (64, 192),
    ("I;16", "TIFF"): (64, 192),
    ("L", "JPEG"): (64, 192),
    ("L", "JPEG2000"): (64, 192),
    ("I;16", "JPEG2000"): (64, 192),
    ("I", "TIFF"): None,
    ("F", "TIFF"): None,
    ("LAB", "TIFF"): None,
}


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_an_image_of_every_mode_is_shown_as_it_is_or_refused(mode: str, kind: str, tmp_path: Path) -> None:
    grey = np.full((16, 16), 64, np.uint8)
    grey[:, 8:] = 192
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.frombytes("LAB", (16, 16), bytes(3 * 256))
    else:
        image = Image.fromarray(grey).convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode, dither=0)
    image.save(tmp_path / "x", kind)
    if MODES[mode, kind] is None:
        with pytest.raises(DatasetError, match="x' is no readable image"):
            open_image(tmp_path / "x", "L")
        return
    for wanted in ("L", "RGB"):
        found = np.asarray(open_image(tmp_path / "x", wanted)).reshape(16, 16, -1)
        assert np.abs(found[4, [2, 13], 0].astype(int) - MODES[mode, kind]).max() <= 2
