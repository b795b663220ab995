import pytest

from hypertorch.fewshot.datasets.omniglot_partitions import (
    BACKGROUND,
    EVALUATION,
    PARTITIONS,
    SPLITS,
    partition_members,
)


def flat(partition, split):
    return [
        (part.folder, *character)
        for part, characters in partition_members(partition, split)
        for character in characters
    ]


def test_published_sizes():
    assert [len(part.alphabets) for part in (BACKGROUND, EVALUATION)] == [30, 20]
    assert [len(part.characters) for part in (BACKGROUND, EVALUATION)] == [964, 659]


@pytest.mark.parametrize(
    ("partition", "split", "size"),
    [
        ("vinyals", "meta_train", 1028),
        ("vinyals", "meta_val", 172),
        ("vinyals", "meta_test", 423),
        ("vinyals", "meta_train+meta_val", 1200),
        ("lake", "meta_train", 792),
        ("lake", "meta_val", 172),
        ("lake", "meta_test", 659),
        ("lake", "meta_train+meta_val", 964),
        ("lake", "meta_train+meta_val+meta_test", 1623),
    ],
)
def test_sizes(partition, split, size):
    assert len(set(flat(partition, split))) == len(flat(partition, split)) == size


@pytest.mark.parametrize("partition", PARTITIONS)
def test_each_character_is_in_one_split(partition):
    together = [character for split in SPLITS for character in flat(partition, split)]
    assert len(set(together)) == len(together) == 1623


def test_vinyals_divides_gurmukhi_and_no_other_alphabet():
    splits = {}
    for split in SPLITS:
        for part, alphabet, number in flat("vinyals", split):
            splits.setdefault((part, alphabet), {}).setdefault(split, []).append(number)
    divided = {alphabet: where for alphabet, where in splits.items() if len(where) > 1}
    expected = {"meta_train": list(range(1, 42)), "meta_test": [42, 43, 44, 45]}
    assert divided == {("images_evaluation", "Gurmukhi"): expected}
    validation = {alphabet for (_, alphabet), where in splits.items() if "meta_val" in where}
    assert validation == {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
    testing = {alphabet for (_, alphabet), where in splits.items() if "meta_test" in where}
    assert testing == {"Gurmukhi", *(name for name, _ in EVALUATION.alphabets[8:])}


def test_lake_keeps_the_published_parts():
    assert {part for part, *_ in flat("lake", "meta_test")} == {"images_evaluation"}
    assert {part for part, *_ in flat("lake", "meta_train+meta_val")} == {"images_background"}


@pytest.mark.parametrize(
    ("partition", "split", "message"),
    [
        ("omniglot", "meta_train", r"`partition` is 'omniglot': .*Use one of 'vinyals', 'lake'"),
        ("lake", "train", r"`split` is 'train': there is no such split. Use one of 'meta_train'.*joined by '\+'"),
        ("lake", "meta_train+meta_train", r"`split` is 'meta_train\+meta_train'"),
        ("lake", "", r"`split` is ''"),
        ("lake", None, r"`split` is None"),
    ],
)
def test_unknown_names_are_refused(partition, split, message):
    with pytest.raises(ValueError, match=message):
        partition_members(partition, split)
