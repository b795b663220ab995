"""Alphabets of characters, each of them a task: Omniglot's, from a folder, or made-up ones, which are embedded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from experiments.common.commands.failures import ExpectedFailure
from hypertorch.errors import DatasetError
from hypertorch.fewshot import Omniglot, StrokeCharacters

AlphabetsName: TypeAlias = Literal["strokes", "omniglot"]
"""Made-up characters, or the 30 alphabets of Omniglot's background part."""

_DRAWINGS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Alphabets:
    """Drawings of the characters of several alphabets.

    Args:
        names: of the alphabets.
        images: pixels from 0 (paper) to 1 (ink), shape `(alphabets, characters, drawings, pixels)`.
    """

    names: tuple[str, ...]
    images: Tensor


def load_alphabets(
    name: AlphabetsName,
    *,
    root: str | None,
    num_alphabets: int,
    num_characters: int,
    num_drawings: int,
    image_size: int,
    seed: int,
) -> Alphabets:
    """Returns alphabets, and after them the same ones with every drawing turned by 90 degrees, counter-clockwise.

    Args:
        name: which characters.
        root: the folder of Omniglot; only for "omniglot".
        num_alphabets: how many, before they are turned.
        num_characters: of each alphabet.
        num_drawings: of each character, at most 20.
        image_size: height and width (unit: pixels).
        seed: of the choice of alphabets, of their characters and of their drawings.

    Raises:
        ExpectedFailure: if there are not as many, or the folder is missing or not needed.
    """
    if num_alphabets < 1 or num_characters < 2:
        raise ExpectedFailure(
            f"`experiment.num_alphabets` is {num_alphabets} and `experiment.num_characters` {num_characters}: there is "
            "nothing to tell apart. Ask for at least 1 alphabet with 2 characters."
        )
    if not 1 <= num_drawings <= _DRAWINGS:
        raise ExpectedFailure(
            f"the experiment asks for {num_drawings} drawings of a character, but each has {_DRAWINGS}. Ask for fewer."
        )
    known = _strokes(root, num_alphabets, num_characters, image_size) if name == "strokes" else _omniglot(
        name, root, image_size
    )  # fmt: skip
    large = [alphabet for alphabet, images in known.items() if len(images) >= num_characters]
    if num_alphabets > len(large):
        raise ExpectedFailure(
            f"`experiment.num_alphabets` is {num_alphabets}, but `experiment.data={name}` has {len(large)} alphabets "
            f"with {num_characters} characters or more. Ask for as many at most."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = [large[index] for index in torch.randperm(len(large), generator=generator)[:num_alphabets].tolist()]
    drawn: list[Tensor] = []
    for alphabet in chosen:
        images = known[alphabet]
        characters = torch.randperm(len(images), generator=generator)[:num_characters]
        drawings = torch.rand(num_characters, _DRAWINGS, generator=generator).argsort(dim=1)[:, :num_drawings]
        drawn.append(images[characters[:, None], drawings])
    images = torch.stack(drawn).float() / 255.0
    both = torch.cat([images, images.rot90(1, dims=(-2, -1))])
    return Alphabets(names=(*chosen, *(f"{alphabet}, turned" for alphabet in chosen)), images=both.flatten(-2))


def _strokes(root: str | None, num_alphabets: int, num_characters: int, image_size: int) -> dict[str, Tensor]:
    """Returns drawings by alphabet, shape `(characters, drawings, height, width)`."""
    if root is not None:
        raise ExpectedFailure(
            f"`experiment.root` is {root!r}, but `experiment.data=strokes` are made-up characters: they need no "
            "folder. Leave it out, or write experiment.data=omniglot."
        )
    classes = StrokeCharacters(split="meta_train", num_classes=num_alphabets * num_characters, image_size=image_size)
    images = classes.images.reshape(num_alphabets, num_characters, _DRAWINGS, image_size, image_size)
    return {f"set {index + 1}": own for index, own in enumerate(images)}


def _omniglot(name: str, root: str | None, image_size: int) -> dict[str, Tensor]:
    """Returns drawings by alphabet, shape `(characters, drawings, height, width)`."""
    if name != "omniglot":
        raise ExpectedFailure(f"`experiment.data` is {name!r}, which names no characters. Use strokes or omniglot.")
    if root is None:
        raise ExpectedFailure(
            "`experiment.root` is null, but `experiment.data=omniglot` reads Omniglot from a folder. Write "
            "experiment.root=FOLDER, with images_background.zip in it."
        )
    try:
        classes = Omniglot(
            root, split="meta_train+meta_val", partition="lake", rotations=False, image_size=image_size
        )  # fmt: skip
    except DatasetError as error:
        raise ExpectedFailure(f"`experiment.root` is {root!r}, but Omniglot cannot be read there. {error}") from error
    images = classes.images.reshape(-1, _DRAWINGS, image_size, image_size)
    alphabets = groupby(enumerate(classes.class_names), key=lambda entry: entry[1].split("/")[0])
    return {alphabet.replace("_", " "): images[[index for index, _ in members]] for alphabet, members in alphabets}
