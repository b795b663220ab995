"""Omniglot: 1,623 handwritten characters from 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hypertorch.checks.values import check_switch
from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets.cache import default_cache_dir
from hypertorch.fewshot.datasets.data_folder import data_folder
from hypertorch.fewshot.datasets.download import OMNIGLOT_FILES, download_omniglot
from hypertorch.fewshot.datasets.image_classes import ImageClasses
from hypertorch.fewshot.datasets.image_size import check_image_size
from hypertorch.fewshot.datasets.omniglot_files import HOW_TO_GET, read_part
from hypertorch.fewshot.datasets.omniglot_partitions import Members, partition_members

_QUARTER_TURNS = (0, 90, 180, 270)


def Omniglot(  # noqa: N802  (made like an instance, `Omniglot(split=...)`)
    root: str | Path | None = None,
    *,
    split: str,
    partition: str = "vinyals",
    rotations: bool | Sequence[int] = True,
    image_size: int = 28,
    download: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> ImageClasses:
    """Returns one split of Omniglot as classes of `(1, image_size, image_size)` images, paper 0 and ink 255.

    Two partitions are in use, and results are comparable only within one:

    - `"vinyals"`: 1,200 characters for training and 423 for testing, as in most of the few-shot literature. Vinyals et
      al. chose theirs at random and published no list; this is the list that later work shares: in alphabetical order,
      background part first, the first 1,200 characters train, so that characters 1 to 41 of Gurmukhi train and 42 to 45
      test. `meta_val` is 172 of the 1,200, the background alphabets Armenian, Bengali, Early_Aramaic, Hebrew and
      Mkhedruli_(Georgian); `meta_train` is the other 1,028.
    - `"lake"`: the two parts as published. `meta_test` is the evaluation part, 20 alphabets with 659 characters; of the
      964 of the background part, `meta_val` has the same 172 and `meta_train` the other 792. No alphabet is in two
      splits. The division into `meta_train` and `meta_val` is a choice of this library.

    `split="meta_train+meta_val"` joins the two, for a final training run with settings that are already chosen.

    With `rotations`, each character turned by 90, 180 and 270 degrees (counter-clockwise) counts as three more classes;
    all four are always in the same split. Classes are named `"Alphabet/characterNN"`, turned ones with `/rot090`,
    `/rot180` or `/rot270` appended.

    Drawings are decoded at first use and cached (`cache_dir`), under a key with the content of the files, so that
    changed files are read anew. Contents are checked (alphabets, characters, 20 drawings each, 105 x 105 pixels), not a
    published checksum, so archives that were packed again are as good as the official ones.

    Cost: about 5 s to decode everything at first, well under a second later; `num_classes * 20 * image_size**2` bytes.

    Args:
        root: folder with `images_background.zip` and `images_evaluation.zip`, or with the unpacked folders
            `images_background` and `images_evaluation`; a subfolder `omniglot` is looked into as well. By default the
            environment variable HYPERTORCH_DATA says where, else the folder that downloads go to.
        split: `"meta_train"`, `"meta_val"`, `"meta_test"`, or several joined by `+`.
        partition: `"vinyals"` or `"lake"`.
        rotations: whether turned characters are new classes; or which turns to have, out of 0, 90, 180 and 270 degrees.
        image_size: height and width (unit: pixels); drawings are scaled by Lanczos' filter. 105 keeps them as they are.
        download: fetches archives that are missing into `root`, with their checksums verified.
        cache_dir: folder for decoded drawings; by default the user's cache folder.
        progress: shows bars while downloading and decoding.

    Raises:
        ValueError: if `split`, `partition`, `rotations` or `image_size` is none of the allowed.
        DatasetError: if the data is missing, damaged or incomplete, or cannot be downloaded.

    References:
        Lake, Salakhutdinov and Tenenbaum (2015), Human-level concept learning through probabilistic program induction.
        Vinyals et al. (2016), Matching networks for one shot learning, section 4.1.1.
    """
    check_switch("progress", progress)
    members = partition_members(partition, split)
    degrees = _checked_rotations(rotations)
    check_image_size(image_size)
    folder = _find_root(root, members)
    if download:
        # The lake partition's training classes are all in one archive, so the other is not fetched for them.
        needed = {f"{part.folder}.zip" for part, _ in members if not (folder / part.folder).is_dir()}
        files = {name: checksum for name, checksum in OMNIGLOT_FILES.items() if name in needed}
        download_omniglot(folder, progress=progress, files=files)
    classes = load_classes(folder, members, degrees, image_size=image_size, cache_dir=cache_dir, progress=progress)
    return replace(classes, source="Omniglot", split=split)


def load_classes(
    root: Path,
    members: Members,
    rotations: Sequence[int] = (0,),
    *,
    image_size: int = 28,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> ImageClasses:
    """Returns the given characters, each in the given rotations, from the official layout under `root`.

    Args:
        root: folder with the archives or the unpacked folders.
        members: the characters wanted, by the part that holds them.
        rotations: counter-clockwise turns, out of 0, 90, 180 and 270 degrees; each makes a class of every character.
        image_size: height and width (unit: pixels).
        cache_dir: folder for decoded drawings; by default the user's cache folder.
        progress: shows a bar while decoding.

    Raises:
        DatasetError: if the data is missing, damaged or incomplete.
    """
    chosen: list[np.ndarray] = []
    names: list[str] = []
    for part, characters in members:
        # The whole part is decoded whatever is wanted of it: one cache file serves every split, partition and rotation.
        drawings = read_part(root, part, image_size=image_size, cache_dir=cache_dir, progress=progress)
        position = {character: index for index, character in enumerate(part.characters)}
        wanted = drawings[[position[character] for character in characters]]
        # Along a new axis behind the characters, as the names below are nested: character by character, turn by turn.
        turned = np.stack([np.rot90(wanted, turn // 90, axes=(-2, -1)) for turn in rotations], axis=1)
        chosen.append(turned.reshape(-1, *wanted.shape[1:]))
        names += [_class_name(character.folder, turn) for character in characters for turn in rotations]
    counts = tuple(len(drawings) for classes in chosen for drawings in classes)
    images = np.concatenate([classes.reshape(-1, 1, image_size, image_size) for classes in chosen])
    return ImageClasses(images=torch.from_numpy(images), counts=counts, class_names=tuple(names))


def _class_name(folder: str, turn: int) -> str:
    return f"{folder}/rot{turn:03d}" if turn else folder


def _checked_rotations(rotations: bool | Sequence[int]) -> tuple[int, ...]:
    if isinstance(rotations, bool):
        return _QUARTER_TURNS if rotations else (0,)
    degrees = tuple(rotations) if isinstance(rotations, Sequence) else ()
    if not degrees or not set(degrees) <= set(_QUARTER_TURNS) or len(set(degrees)) != len(degrees):
        raise ValueError(
            f"`rotations` is {rotations!r}: only whole quarter turns keep every pixel. Use True, False, or distinct "
            "degrees out of 0, 90, 180 and 270."
        )
    return degrees


def default_root() -> Path:
    """Returns where Omniglot is expected and downloaded to when no `root` is given."""
    shared = os.environ.get("HYPERTORCH_DATA")
    # What HYPERTORCH_DATA names is shared between data sets, so downloads go to a subfolder.
    return (Path(shared).expanduser() if shared else default_cache_dir()) / "omniglot"


def _find_root(root: str | Path | None, members: Members) -> Path:
    """Returns the folder that has the data, or the one in which to expect it."""
    folder = data_folder(root)
    if folder is None:
        return default_root()
    if folder.is_file():
        raise DatasetError(
            f"`root` is {str(folder)!r}, a file: the folder that holds 'images_background.zip' and "
            f"'images_evaluation.zip' is needed. {HOW_TO_GET}"
        )
    has_data = any((folder / part.folder).is_dir() or (folder / f"{part.folder}.zip").is_file() for part, _ in members)
    # A folder that is given is where downloads go; one that the environment names is shared, so they go below it.
    inner = folder / "omniglot"
    return inner if not has_data and (inner.is_dir() or root is None) else folder
