"""Image files and folders of data sets that are not what they should be."""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypertorch.fewshot import CIFARFS, ImageFolder, MiniImageNet, Omniglot
from tests.attacks.attack import CANARY, Attack
from tests.attacks.strangers import Touch


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bmp_of(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def gif_of(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, width, height, 0)
        + b"\x02\x02\x44\x01\x00;"
    )


def tiff_of(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF", **options)
    return file.getvalue()


TIFF_HEAD = b"II*\x00\x08\x00\x00\x00"


def tiff_tags(*tags: tuple[int, int, int, int]) -> bytes:
    return TIFF_HEAD + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


CONTENTS: dict[str, tuple[str, bytes]] = {
    "empty": ("x.png", b""),
    "text": ("x.png", b"no picture"),
    "zeros": ("x.png", bytes(1000)),
    "a page of the web": ("x.jpg", b"<!DOCTYPE html><html><body>404</body></html>"),
    "a pointer of Git LFS": ("x.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    "a signature alone": ("x.png", b"\x89PNG\r\n\x1a\n"),
    "PNG cut within its head": ("x.png", png()[:20]),
    "PNG cut within its pixels": ("x.png", png((64, 64))[:-30]),
    "PNG without pixels": (
        "x.png",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)),
    ),
    "PNG with a changed byte": ("x.png", png()[:45] + bytes([png()[45] ^ 255]) + png()[46:]),
    "PNG without width": ("x.png", png_of(0, 8, b"")),
    "PNG of negative width": ("x.png", png_of(2**31, 8, b"")),
    "PNG of unknown depth": ("x.png", png_of(8, 8, b"", depth=7)),
    "PNG of unknown colours": ("x.png", png_of(8, 8, b"", colour=5)),
    "PNG bomb": ("x.png", png_of(30_000, 30_000, bytes(10_000))),
    "PNG bomb within a warning": ("x.png", png_of(10_000, 10_000, bytes(10_000))),
    "PNG of one line of 100 million": ("x.png", png_of(100_000_000, 1, bytes(10_000))),
    "PNG bomb of text": (
        "x.png",
        png_of(8, 8, bytes(25 * 8), extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))),
    ),
    "PNG bomb of a profile": (
        "x.png",
        png_of(8, 8, bytes(25 * 8), extra=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**7)))),
    ),
    "BMP bomb": ("x.bmp", bmp_of(100_000, 100_000)),
    "BMP within a warning": ("x.bmp", bmp_of(11_000, 11_000)),
    "BMP cut": ("x.bmp", bmp_of(8, 8)),
    "GIF bomb": ("x.gif", gif_of(65_535, 65_535)),
    "GIF cut": ("x.gif", gif_of(64, 64)[:30]),
    "GIF without pixels": ("x.gif", b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";"),
    "JPEG cut": ("x.jpg", png((64, 64), kind="JPEG")[:300]),
    "JPEG of a start alone": ("x.jpg", b"\xff\xd8\xff"),
    "WebP cut": ("x.webp", png((64, 64), kind="WEBP")[:20]),
    "PGM bomb": ("x.pgm", b"P5\n60000 60000\n255\n"),
    "PGM of negative size": ("x.pgm", b"P5\n-8 8\n255\n" + bytes(64)),
    "PGM of words": ("x.pgm", b"P5\neight eight\n255\n" + bytes(64)),
    "PGM of no white": ("x.pgm", b"P5\n8 8\n0\n" + bytes(64)),
    "PGM cut": ("x.pgm", b"P5\n8 8\n255\n" + bytes(60)),
    "PGM in plain text cut": ("x.pgm", b"P2\n8 8\n255\n1 2 3"),
    "TIFF of 32 bits": ("x.tif", tiff_of(np.zeros((8, 8), np.int32))),
    "TIFF of floats": ("x.tif", tiff_of(np.zeros((8, 8), np.float32))),
    "TIFF without tags": ("x.tif", tiff_tags()),
    "TIFF of no size": ("x.tif", tiff_tags((256, 3, 1, 0), (257, 3, 1, 0))),
    "TIFF bomb": (
        "x.tif",
        tiff_tags(
            (256, 4, 1, 10**5), (257, 4, 1, 10**5), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 8)
        ),
    ),
    "TIFF that refers to itself": ("x.tif", TIFF_HEAD + b"\x00\x00" + struct.pack("<I", 8)),
    "TGA cut": ("x.tga", bytes(10)),
    "ICO without pictures": ("x.ico", b"\0\0\1\0\0\0"),
    "JPEG 2000 cut": ("x.jp2", b"\0\0\0\x0cjP  \r\n\x87\n"),
    "DDS cut": ("x.dds", b"DDS " + bytes(20)),
    "PSD cut": ("x.psd", b"8BPS\0\1" + bytes(6)),
    "FITS of nothing": ("x.fits", b"SIMPLE  =                    T" + b" " * 50),
    "a pickle": ("x.png", b"\x80\x04."),
}


def folder_with(folder: Path, name: str, content: bytes) -> Path:
    (folder / "a").mkdir(exist_ok=True)
    (folder / "a" / name).write_bytes(content)
    return folder


def contents() -> Iterator[Attack]:
    for name, (file, content) in CONTENTS.items():

        def carry_out(folder: Path, file: str = file, content: bytes = content) -> object:
            return ImageFolder(folder_with(folder, file, content), image_size=8, cache_dir=folder / "cache")

        yield Attack("image files", name, carry_out, names=rf"'.*{file}'")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    # A path of a socket is at most 108 characters: so it is bound from its own folder.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(path.name)
    finally:
        os.chdir(before)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": pipe,
    "a socket": bound,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a folder": lambda path: path.symlink_to(path.parent),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to an empty device": lambda path: path.symlink_to("/dev/null"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_suffix(".fifo.txt")), path.symlink_to("x.fifo.txt")),
    "a link to a file of the system": lambda path: path.symlink_to("/proc/self/environ"),
}


def csv_folder(folder: Path, rows: str | bytes, *, images: tuple[str, ...] = ("x.png",)) -> Path:
    (folder / "images").mkdir()
    for name in images:
        (folder / "images" / name).write_bytes(png())
    content = rows if isinstance(rows, bytes) else rows.encode()
    (folder / "train.csv").write_bytes(content)
    return folder


def no_files() -> Iterator[Attack]:
    for name, make in NO_FILES.items():

        def in_a_folder(folder: Path, make: Callable[[Path], object] = make) -> object:
            (folder / "a").mkdir()
            make(folder / "a/x.png")
            return ImageFolder(folder, image_size=8, cache_dir=folder / "cache")

        def in_a_table(folder: Path, make: Callable[[Path], object] = make) -> object:
            csv_folder(folder, "filename,label\nx.png,a\n", images=())
            make(folder / "images/x.png")
            return MiniImageNet(folder, split="meta_train", image_size=8, cache_dir=folder / "cache")

        def as_a_mosaic(folder: Path, make: Callable[[Path], object] = make) -> object:
            (folder / "classes").mkdir()
            from hypertorch.fewshot.datasets.cifar_fs_classes import CIFAR_FS_CLASSES

            for own in CIFAR_FS_CLASSES["meta_val"]:
                make(folder / f"classes/{own}.png")
            return CIFARFS(folder, split="meta_val", cache_dir=folder / "cache")

        yield Attack("no image files", f"{name} in a folder", in_a_folder, names="x.png")
        yield Attack("no image files", f"{name} in a table", in_a_table, names="x.png")
        yield Attack("no image files", f"{name} as a mosaic", as_a_mosaic, names=r"\.png|classes")


TABLES: dict[str, str | bytes] = {
    "an absolute path": "filename,label\n{outside},a\n",
    "a path upwards": "filename,label\n../../outside.png,a\n",
    "a path down and upwards": "filename,label\nsub/../../../outside.png,a\n",
    "a path of the home": "filename,label\n~/x.png,a\n",
    "a link out of the folder": "filename,label\nlink.png,a\n",
    "a class that leads out": "filename,label\noutside.png,../..\n",
    "an absolute class": "filename,label\noutside.png,{above}\n",
    "a folder for a file": "filename,label\nsub,a\n",
    "the folder itself": "filename,label\n.,a\n",
    "a zero byte": b"filename,label\nx\0.png,a\n",
    "a zero byte in a class": b"filename,label\nx.png,a\0b\n",
    "a name that is too long": "filename,label\n" + "x" * 5000 + ".png,a\n",
    "a class that is too long": "filename,label\ny.png," + "x" * 5000 + "\n",
    "a field that is too long": "filename,label\nx.png," + "x" * 200_000 + "\n",
    "no column of labels": "filename\nx.png\n",
    "other columns": "file,class\nx.png,a\n",
    "columns in capitals": "Filename,Label\nx.png,a\n",
    "semicolons": "filename;label\nx.png;a\n",
    "no heading": "x.png,a\n",
    "an empty file": "",
    "a heading alone": "filename,label\n",
    "an empty name": "filename,label\n,a\n",
    "an empty label": "filename,label\nx.png,\n",
    "blanks for a label": "filename,label\nx.png,   \n",
    "a row that is too short": "filename,label\nx.png\n",
    "a row that is too long": "filename,label\nx.png,a,b\n",
    "a column twice": "filename,label,label\nx.png,a,b\n",
    "the same row twice": "filename,label\nx.png,a\nx.png,a\n",
    "the same file in two classes": "filename,label\nx.png,a\nx.png,b\n",
    "the same file by another path": "filename,label\nx.png,a\n./x.png,b\n",
    "the same file by a link": "filename,label\nx.png,a\nsame.png,b\n",
    "the same file by a hard link": "filename,label\nx.png,a\nhard.png,b\n",
    "UTF-16": "filename,label\nx.png,a\n".encode("utf-16"),
    "Latin 1": "filename,label\nx.png,Größe\n".encode("latin1"),
    "an archive": b"PK\x03\x04" + bytes(range(256)),
    "an open quote": 'filename,label\n"x.png,a\n',
    "a missing file": "filename,label\ny.png,a\n",
}


def tables() -> Iterator[Attack]:
    for name, rows in TABLES.items():

        def carry_out(above: Path, rows: str | bytes = rows) -> object:
            folder = above / "root"
            folder.mkdir()
            (above / "outside.png").write_bytes(png())
            if isinstance(rows, str):
                rows = rows.replace("{outside}", str(above / "outside.png")).replace("{above}", str(above))
            csv_folder(folder, rows)
            (folder / "images/sub").mkdir()
            (folder / "images/link.png").symlink_to(above / "outside.png")
            (folder / "images/same.png").symlink_to("x.png")
            os.link(folder / "images/x.png", folder / "images/hard.png")
            return MiniImageNet(folder, split="meta_train", image_size=8, cache_dir=above / "cache")

        yield Attack("tables of files", name, carry_out, names="`root`")


def in_two_splits(by: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    def in_folders(folder: Path) -> object:
        for split, own in (("train", "a"), ("test", "b")):
            (folder / split / own).mkdir(parents=True)
        (folder / "train/a/x.png").write_bytes(png())
        by(folder / "train/a/x.png", folder / "test/b/y.png")
        return ImageFolder(folder, split="meta_train", image_size=8, cache_dir=folder / "cache")

    return in_folders


def twice_in_tables(first: str, second: str) -> Callable[[Path], object]:
    def in_tables(folder: Path) -> object:
        csv_folder(folder, f"filename,label\n{first},a\n")
        (folder / "images/link.png").symlink_to("x.png")
        os.link(folder / "images/x.png", folder / "images/hard.png")
        (folder / "test.csv").write_text(f"filename,label\n{second},b\n")
        return MiniImageNet(folder, split="meta_train", image_size=8, cache_dir=folder / "cache")

    return in_tables


def in_one_folder(prepare: Callable[[Path], object], **settings: Any) -> Callable[[Path], object]:
    def carry_out(folder: Path) -> object:
        for own in ("a", "b"):
            (folder / own).mkdir()
            (folder / own / "x.png").write_bytes(png((8, 8)) + own.encode())
        prepare(folder)
        return ImageFolder(folder, **{"image_size": 8, "cache_dir": folder / "cache", **settings})

    return carry_out


def splits() -> Iterator[Attack]:
    kind = "files of two splits"
    yield Attack(kind, "a link, in folders", in_two_splits(lambda file, other: other.symlink_to(file)), names="`root`")
    yield Attack(
        kind, "a hard link, in folders", in_two_splits(lambda file, other: os.link(file, other)), names="`root`"
    )
    yield Attack(
        kind,
        "a link to the class, in folders",
        in_two_splits(lambda file, other: (other.parent.rmdir(), other.parent.symlink_to(file.parent))),
        names="`root`",
    )
    for first, second in (("x.png", "x.png"), ("x.png", "./x.png"), ("x.png", "link.png"), ("hard.png", "x.png")):
        yield Attack(kind, f"{second} and {first}, in tables", twice_in_tables(first, second), names="`root`")
    yield Attack(
        kind,
        "a link, in two classes",
        in_one_folder(lambda folder: (folder / "b/y.png").symlink_to(folder / "a/x.png")),
        names="`root`",
    )
    yield Attack(
        kind,
        "a hard link, in two classes",
        in_one_folder(lambda folder: os.link(folder / "a/x.png", folder / "b/y.png")),
        names="`root`",
    )
    yield Attack(
        kind,
        "a link, in one class",
        in_one_folder(lambda folder: (folder / "a/y.png").symlink_to(folder / "a/x.png")),
        names="`root`",
    )
    yield Attack(
        kind,
        "a class that is a link to another",
        in_one_folder(lambda folder: (folder / "c").symlink_to(folder / "a")),
        names="`root`",
    )


SIZES: dict[str, Any] = {
    "zero": 0,
    "negative": -8,
    "a billion": 10**9,
    "2 ** 63": 2**63,
    "2 ** 200": 2**200,
    "true": True,
    "a float": 8.0,
    "a half": 8.5,
    "NaN": float("nan"),
    "a word": "8",
    "none": None,
    "a pair": (8, 8),
    "an array": np.ones(1),
}


def sizes() -> Iterator[Attack]:
    for name, value in SIZES.items():
        yield Attack(
            "sizes of images",
            f"{name} for a folder",
            in_one_folder(lambda folder: None, image_size=value),
            names="`image_size`",
        )
        yield Attack(
            "sizes of images",
            f"{name} for Omniglot",
            lambda folder, value=value: Omniglot(folder, split="meta_train", image_size=value),
            names="`image_size`",
        )
        yield Attack(
            "sizes of images",
            f"{name} for mini-ImageNet",
            lambda folder, value=value: MiniImageNet(
                csv_folder(folder, "filename,label\nx.png,a\n"),
                split="meta_train",
                image_size=value,
                cache_dir=folder / "cache",
            ),
            names="`image_size`",
        )
    for name, value in {"none": None, "2": 2, "true": True, "a float": 3.0, "a word": "RGB", "a list": [3]}.items():
        yield Attack(
            "sizes of images",
            f"{name} for channels",
            in_one_folder(lambda folder: None, channels=value),
            names="`channels`",
        )


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "a call": lambda path: pickle.dumps(Touch(path)),
    "a call in the old protocol": lambda path: pickle.dumps(Touch(path), protocol=0),
    "os.system": lambda path: b"cos\nsystem\n(S'touch " + str(path).encode() + b"'\ntR.",
    "builtins.eval": lambda path: (
        b"cbuiltins\neval\n(S'open(" + repr(str(path)).encode().replace(b"'", b'"') + b', "w")\'\ntR.'
    ),
    "numpy's reader of pickles": lambda path: b"cnumpy\nload\n(S'x'\ntR.",
    "an attribute of what is allowed": lambda path: b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    "a codec that opens files": lambda path: b"c_codecs\nlookup\n(S'x'\ntR.",
    "an extension code": lambda path: b"\x80\x02\x82\x01.",
    "a persistent name": lambda path: b"Px\n.",
    "cut": lambda path: pickle.dumps({"data": 1})[:-3],
    "empty": lambda path: b"",
    "text": lambda path: b"no pickle",
    "a number": lambda path: pickle.dumps(3),
    "a list": lambda path: pickle.dumps([1, 2]),
    "nothing": lambda path: pickle.dumps(None),
    "other entries": lambda path: pickle.dumps({"a": 1}),
    "a million brackets": lambda path: b"(" * 1_000_000 + b".",
    "brackets in brackets": lambda path: b"]" * 100_000 + b"a" * 99_999 + b".",
    "an array of objects": lambda path: pickle.dumps(
        {"data": np.array([None]), "fine_labels": [0], "fine_label_names": ["a"]}
    ),
    "an array of words": lambda path: pickle.dumps(
        {"data": np.array(["a"]), "fine_labels": [0], "fine_label_names": ["a"]}
    ),
    "words for labels": lambda path: pickle.dumps(
        {"data": np.zeros((1, 3072), np.uint8), "fine_labels": ["a"], "fine_label_names": ["a"]}
    ),
    "pixels of floats": lambda path: pickle.dumps(cifar(np.zeros((600, 3072), np.float32), [0] * 600)),
    "pixels of 16 bits": lambda path: pickle.dumps(cifar(np.zeros((600, 3072), np.uint16), [0] * 600)),
    "pixels of another size": lambda path: pickle.dumps(cifar(np.zeros((600, 3000), np.uint8), [0] * 600)),
    "fewer labels than pixels": lambda path: pickle.dumps(cifar(np.zeros((600, 3072), np.uint8), [0] * 599)),
    "a label beyond the names": lambda path: pickle.dumps(cifar(np.zeros((600, 3072), np.uint8), [100] * 600)),
    "names that are numbers": lambda path: pickle.dumps(
        {**cifar(np.zeros((600, 3072), np.uint8), [0] * 600), "fine_label_names": 3}
    ),
    "a promise of memory": lambda path: b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.",
    "a frame beyond the file": lambda path: b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b".",
    "a length beyond memory": lambda path: b"\x80\x04\x95" + struct.pack("<Q", 2**63 - 1) + b".",
    "an index beyond memory": lambda path: b"\x80\x04Nr\xff\xff\xff\xff.",
    "a number of a million digits": lambda path: b"I" + b"9" * 1_000_000 + b"\n.",
}


def cifar(data: np.ndarray, labels: list[int]) -> dict[str, Any]:
    from hypertorch.fewshot.datasets.cifar_fs_classes import CIFAR_FS_CLASSES

    names = [name for part in CIFAR_FS_CLASSES.values() for name in part]
    return {"data": data, "fine_labels": labels, "fine_label_names": names}


def pickles() -> Iterator[Attack]:
    for name, make in PICKLES.items():

        def unpacked(folder: Path, make: Callable[[Path], bytes] = make) -> object:
            (folder / "cifar-100-python").mkdir()
            for part in ("train", "test", "meta"):
                (folder / "cifar-100-python" / part).write_bytes(make(folder / CANARY))
            return CIFARFS(folder, split="meta_val", cache_dir=folder / "cache")

        def packed(folder: Path, make: Callable[[Path], bytes] = make) -> object:
            content = make(folder / CANARY)
            with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz", compresslevel=1) as archive:
                for part in ("train", "test", "meta"):
                    member = tarfile.TarInfo(f"cifar-100-python/{part}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
            return CIFARFS(folder, split="meta_val", cache_dir=folder / "cache")

        yield Attack("pickles of CIFAR-100", name, unpacked, names="`root`")
        yield Attack("pickles of CIFAR-100", f"{name}, packed", packed, names="`root`")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info, bytes(size)


INSIDE = "cifar-100-python"
ARCHIVES: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {
    "nothing": [],
    "members upwards": [member(f"../{CANARY}", size=1)],
    "absolute members": [member(f"/tmp/{CANARY}", size=1)],
    "links for members": [
        member(f"{INSIDE}/{name}", tarfile.SYMTYPE, "/etc/passwd") for name in ("train", "test", "meta")
    ],
    "links upwards": [member(f"{INSIDE}/{name}", tarfile.SYMTYPE, "../../x") for name in ("train", "test", "meta")],
    "hard links out": [
        member(f"{INSIDE}/{name}", tarfile.LNKTYPE, "/etc/passwd") for name in ("train", "test", "meta")
    ],
    "links in a circle": [
        member(f"{INSIDE}/train", tarfile.SYMTYPE, "test"),
        member(f"{INSIDE}/test", tarfile.SYMTYPE, "train"),
    ],
    "a link to itself": [member(f"{INSIDE}/train", tarfile.SYMTYPE, "train")],
    "pipes": [member(f"{INSIDE}/{name}", tarfile.FIFOTYPE) for name in ("train", "test", "meta")],
    "devices": [member(f"{INSIDE}/{name}", tarfile.CHRTYPE) for name in ("train", "test", "meta")],
    "folders": [member(f"{INSIDE}/{name}", tarfile.DIRTYPE) for name in ("train", "test", "meta")],
}


def archives() -> Iterator[Attack]:
    for name, members in ARCHIVES.items():

        def carry_out(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]] = members) -> object:
            root = folder / "root"
            root.mkdir()
            with tarfile.open(root / "cifar-100-python.tar.gz", "w:gz") as archive:
                for info, content in members:
                    archive.addfile(info, io.BytesIO(content))
            return CIFARFS(root, split="meta_val", cache_dir=folder / "cache")

        yield Attack("archives", name, carry_out, names="`root`")

    def bomb(folder: Path) -> object:
        with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as archive:
            assert archive.fileobj is not None
            for part in ("train", "test", "meta"):
                archive.fileobj.write(member(f"{INSIDE}/{part}")[0].tobuf().replace(b"0" * 11, b"7" * 11, 1))
        return CIFARFS(folder, split="meta_val", cache_dir=folder / "cache")

    yield Attack("archives", "a size beyond the disk", bomb, names="`root`")
    for name, content in {"text": b"no archive", "empty": b"", "cut": b"\x1f\x8b\x08\x00"}.items():

        def no_archive(folder: Path, content: bytes = content) -> object:
            (folder / "cifar-100-python.tar.gz").write_bytes(content)
            return CIFARFS(folder, split="meta_val", cache_dir=folder / "cache")

        yield Attack("archives", f"CIFAR-100: {name}", no_archive, names="`root`")

        def no_zip(folder: Path, content: bytes = content) -> object:
            for part in ("images_background", "images_evaluation"):
                (folder / f"{part}.zip").write_bytes(content)
            return Omniglot(folder, split="meta_train", cache_dir=folder / "cache")

        yield Attack("archives", f"Omniglot: {name}", no_zip, names="`root`")
    for name, inside in {
        "nothing": {},
        "a path upwards": {f"../{CANARY}.png": b"x"},
        "an absolute path": {f"/tmp/{CANARY}.png": b"x"},
        "another file": {"images_background/x.png": b"x"},
    }.items():

        def zipped(folder: Path, inside: dict[str, bytes] = inside) -> object:
            for part in ("images_background", "images_evaluation"):
                with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
                    for path, content in inside.items():
                        archive.writestr(path, content)
            return Omniglot(folder, split="meta_train", cache_dir=folder / "cache")

        yield Attack("archives", f"Omniglot: {name} in it", zipped, names="`root`")

    def piped(folder: Path) -> object:
        os.mkfifo(folder / "cifar-100-python.tar.gz")
        return CIFARFS(folder, split="meta_val", cache_dir=folder / "cache")

    def piped_members(folder: Path) -> object:
        (folder / INSIDE).mkdir()
        for part in ("train", "test", "meta"):
            os.mkfifo(folder / INSIDE / part)
        return CIFARFS(folder, split="meta_val", cache_dir=folder / "cache")

    def piped_table(folder: Path) -> object:
        os.mkfifo(folder / "train.csv")
        return MiniImageNet(folder, split="meta_train", cache_dir=folder / "cache")

    def piped_zip(folder: Path) -> object:
        for part in ("images_background", "images_evaluation"):
            os.mkfifo(folder / f"{part}.zip")
        return Omniglot(folder, split="meta_train", cache_dir=folder / "cache")

    yield Attack("archives", "CIFAR-100: a pipe", piped, names="`root`")
    yield Attack("archives", "CIFAR-100: pipes unpacked", piped_members, names="`root`")
    yield Attack("archives", "mini-ImageNet: a pipe for a table", piped_table, names="`root`")
    yield Attack("archives", "Omniglot: a pipe", piped_zip, names="`root`")


ROOTS: dict[str, Any] = {
    "none": None,
    "a number": 3,
    "true": True,
    "a list": ["a"],
    "bytes": b"a",
    "empty": "",
    "absent": "absent",
    "a zero byte": "a\0b",
    "too long": "x" * 5000,
    "a file": __file__,
    "below a file": f"{__file__}/x",
    "a device": "/dev/null",
}
SPLITS: dict[str, Any] = {
    "unknown": "meta",
    "empty": "",
    "a number": 3,
    "none": None,
    "twice": "meta_train+meta_train",
    "a plus alone": "+",
    "a plus at the end": "meta_train+",
    "blanks": " meta_train",
    "capitals": "META_TRAIN",
    "a list": ["meta_train"],
    "true": True,
    "a path": "../meta_train",
}


def roots() -> Iterator[Attack]:
    for name, root in ROOTS.items():
        for make in (ImageFolder, MiniImageNet, CIFARFS, Omniglot):

            def carry_out(folder: Path, root: Any = root, make: Any = make) -> object:
                os.environ.pop("HYPERTORCH_DATA", None)
                given = {} if make is ImageFolder else {"split": "meta_train"}
                return make(root, **given, cache_dir=folder / "cache")

            # Omniglot has a place of its own where none is given.
            if not (make is Omniglot and root in (None, "")):
                yield Attack("places of data", f"{name} for {make.__name__}", carry_out, names="`root`|HYPERTORCH_DATA")
    for name, split in SPLITS.items():
        for make in (ImageFolder, MiniImageNet, CIFARFS, Omniglot):
            if make is ImageFolder and split is None:
                continue  # it has no splits then
            yield Attack(
                "places of data",
                f"{name} for the split of {make.__name__}",
                lambda folder, split=split, make=make: make(folder, split=split, cache_dir=folder / "cache"),
                names="`split`",
            )
    for name, classes in {
        "a text": "ab",
        "twice": ["a", "a"],
        "absent": ["c"],
        "empty": [],
        "a number": 3,
        "numbers": [1],
        "true": True,
        "a path": ["../a"],
        "none in it": [None],
        "lists": [["a"]],
    }.items():
        yield Attack(
            "places of data",
            f"{name} for the classes",
            in_one_folder(lambda folder: None, classes=classes),
            names="`classes`|`root`",
        )


def attacks() -> Iterator[Attack]:
    yield from contents()
    yield from no_files()
    yield from tables()
    yield from splits()
    yield from sizes()
    yield from pickles()
    yield from archives()
    yield from roots()
