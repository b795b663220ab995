"""Which characters Omniglot has, and which of them are for training, validation and testing.

Facts about the data set, not settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Character(NamedTuple):
    """One character of one alphabet; `number` counts from 1, as the official folders do."""

    alphabet: str
    number: int

    @property
    def folder(self) -> str:
        """Path of the character inside its part, in the official layout."""
        return f"{self.alphabet}/character{self.number:02d}"


@dataclass(frozen=True, kw_only=True)
class OmniglotPart:
    """One of the two halves in which Omniglot is published.

    Attributes:
        folder: its top folder; the archive is named `{folder}.zip`.
        alphabets: `(name, number of characters)` in alphabetical order.
        drawings: how often each character was drawn.
        side: height and width of the published drawings (unit: pixels).
    """

    folder: str
    alphabets: tuple[tuple[str, int], ...]
    drawings: int = 20
    side: int = 105

    @property
    def characters(self) -> tuple[Character, ...]:
        """Every character, by alphabet and number."""
        return tuple(Character(name, number) for name, size in self.alphabets for number in range(1, size + 1))


# 30 alphabets with 964 characters, and below 20 with 659. The order is that of the sorted folder names, on which the
# common listing rests.
BACKGROUND = OmniglotPart(
    folder="images_background",
    alphabets=(
        ("Alphabet_of_the_Magi", 20),
        ("Anglo-Saxon_Futhorc", 29),
        ("Arcadian", 26),
        ("Armenian", 41),
        ("Asomtavruli_(Georgian)", 40),
        ("Balinese", 24),
        ("Bengali", 46),
        ("Blackfoot_(Canadian_Aboriginal_Syllabics)", 14),
        ("Braille", 26),
        ("Burmese_(Myanmar)", 34),
        ("Cyrillic", 33),
        ("Early_Aramaic", 22),
        ("Futurama", 26),
        ("Grantha", 43),
        ("Greek", 24),
        ("Gujarati", 48),
        ("Hebrew", 22),
        ("Inuktitut_(Canadian_Aboriginal_Syllabics)", 16),
        ("Japanese_(hiragana)", 52),
        ("Japanese_(katakana)", 47),
        ("Korean", 40),
        ("Latin", 26),
        ("Malay_(Jawi_-_Arabic)", 40),
        ("Mkhedruli_(Georgian)", 41),
        ("N_Ko", 33),
        ("Ojibwe_(Canadian_Aboriginal_Syllabics)", 14),
        ("Sanskrit", 42),
        ("Syriac_(Estrangelo)", 23),
        ("Tagalog", 17),
        ("Tifinagh", 55),
    ),
)

EVALUATION = OmniglotPart(
    folder="images_evaluation",
    alphabets=(
        ("Angelic", 20),
        ("Atemayar_Qelisayer", 26),
        ("Atlantean", 26),
        ("Aurek-Besh", 26),
        ("Avesta", 26),
        ("Ge_ez", 26),
        ("Glagolitic", 45),
        ("Gurmukhi", 45),
        ("Kannada", 41),
        ("Keble", 26),
        ("Malayalam", 47),
        ("Manipuri", 40),
        ("Mongolian", 30),
        ("Old_Church_Slavonic_(Cyrillic)", 45),
        ("Oriya", 46),
        ("Sylheti", 28),
        ("Syriac_(Serto)", 23),
        ("Tengwar", 25),
        ("Tibetan", 42),
        ("ULOG", 26),
    ),
)

PARTITIONS = ("vinyals", "lake")
SPLITS = ("meta_train", "meta_val", "meta_test")

# The common listing takes these five background alphabets, 172 characters, for validation.
_VALIDATION_ALPHABETS = frozenset({"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"})
# The common listing's training classes are the first 1200 characters in alphabetical order, background first: the
# boundary falls inside Gurmukhi, behind its character 41.
_VINYALS_TRAINING = 1200

Members = tuple[tuple[OmniglotPart, tuple[Character, ...]], ...]


def partition_members(partition: str, split: str) -> Members:
    """Returns the characters of a split, by part; parts without any are left out.

    Args:
        partition: `"vinyals"` or `"lake"`.
        split: `"meta_train"`, `"meta_val"`, `"meta_test"`, or several of them joined by `+`.

    Raises:
        ValueError: if there is no such partition or split.
    """
    if not isinstance(partition, str) or partition not in PARTITIONS:
        raise ValueError(
            f"`partition` is {partition!r}: Omniglot is divided in two ways. Use one of "
            f"{', '.join(map(repr, PARTITIONS))}."
        )
    # What is no text gets the message below, not an AttributeError.
    wanted = split.split("+") if isinstance(split, str) else [""]
    if not set(wanted) <= set(SPLITS) or len(set(wanted)) != len(wanted):
        raise ValueError(
            f"`split` is {split!r}: there is no such split. Use one of {', '.join(map(repr, SPLITS))}, or several "
            "joined by '+', such as 'meta_train+meta_val'."
        )
    both = [(part, character) for part in (BACKGROUND, EVALUATION) for character in part.characters]
    # All 964 characters of the background part, and for Vinyals the first 236 of the evaluation part, are to learn
    # from.
    boundary = _VINYALS_TRAINING if partition == "vinyals" else len(BACKGROUND.characters)
    chosen = [
        (part, character)
        for position, (part, character) in enumerate(both)
        if _split_of(character, position < boundary) in wanted
    ]
    members = ((part, tuple(c for p, c in chosen if p is part)) for part in (BACKGROUND, EVALUATION))
    return tuple((part, characters) for part, characters in members if characters)


def _split_of(character: Character, training: bool) -> str:
    if not training:
        return "meta_test"
    return "meta_val" if character.alphabet in _VALIDATION_ALPHABETS else "meta_train"
