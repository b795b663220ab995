import numpy as np
import pytest
import torch

from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets import omniglot
from hypertorch.fewshot.datasets.omniglot import Omniglot, default_root, load_classes
from hypertorch.fewshot.datasets.omniglot_partitions import Character
from hypertorch.fewshot.sampler import EpisodeSampler
from tests.helpers.data import real_data
from tests.helpers.omniglot import SMALL_BACKGROUND, SMALL_EVALUATION, ink, write_archive, write_folders

MEMBERS = (
    (SMALL_BACKGROUND, (Character("Armenian", 2), Character("Greek", 3))),
    (SMALL_EVALUATION, (Character("Gurmukhi", 1),)),
)


@pytest.fixture
def small_root(tmp_path):
    write_archive(tmp_path, SMALL_BACKGROUND)
    write_folders(tmp_path, SMALL_EVALUATION)
    return tmp_path


@pytest.fixture
def small_partition(monkeypatch):
    monkeypatch.setattr(omniglot, "partition_members", lambda partition, split: MEMBERS)


def load(root, rotations=(0,)):
    return load_classes(root, MEMBERS, rotations, image_size=15, cache_dir=root / "cache")


def test_only_the_chosen_characters_are_classes(small_root):
    dataset = load(small_root)
    assert dataset.class_names == ("Armenian/character02", "Greek/character03", "Gurmukhi/character01")
    assert dataset.counts == (4, 4, 4)
    assert dataset.item_shape == (1, 15, 15)
    for row, position in enumerate((1, 4, 0)):
        for drawing in range(4):
            np.testing.assert_array_equal(dataset.images[4 * row + drawing, 0], ink(position, drawing))


def test_rotations_are_classes_of_their_own(small_root):
    plain, turned = load(small_root), load(small_root, (0, 90, 180, 270))
    assert turned.class_names[:5] == (
        "Armenian/character02",
        "Armenian/character02/rot090",
        "Armenian/character02/rot180",
        "Armenian/character02/rot270",
        "Greek/character03",
    )
    assert turned.counts == (4,) * 12
    images = turned.images.reshape(3, 4, 4, 15, 15)
    for turns in range(4):
        expected = torch.rot90(plain.images.reshape(3, 4, 15, 15), turns, dims=(-2, -1))
        assert torch.equal(images[:, turns], expected)


def test_the_public_function_passes_its_settings_on(small_root, small_partition):
    dataset = Omniglot(small_root, split="meta_train", image_size=7, rotations=[0, 180], cache_dir=small_root / "cache")
    assert dataset.num_classes == 6
    assert dataset.item_shape == (1, 7, 7)
    whole = Omniglot(small_root, split="meta_train", cache_dir=small_root / "cache")
    assert whole.class_names == load(small_root, (0, 90, 180, 270)).class_names
    plain = Omniglot(small_root, split="meta_train", rotations=False, cache_dir=small_root / "cache")
    assert plain.num_classes == 3


def test_the_environment_says_where(small_root, small_partition, tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERTORCH_DATA", str(small_root))
    assert Omniglot(split="meta_train", cache_dir=tmp_path / "cache").num_classes == 12
    shelf = tmp_path / "shelf"
    (shelf / "omniglot").mkdir(parents=True)
    for path in (small_root / "images_background.zip", small_root / "images_evaluation"):
        path.rename(shelf / "omniglot" / path.name)
    assert Omniglot(shelf, split="meta_train", cache_dir=tmp_path / "cache").num_classes == 12
    monkeypatch.setenv("HYPERTORCH_DATA", str(shelf))
    assert Omniglot(split="meta_train", cache_dir=tmp_path / "cache").num_classes == 12
    assert default_root() == shelf / "omniglot"


def test_without_a_place_the_cache_folder_is_tried(tmp_path, monkeypatch):
    monkeypatch.delenv("HYPERTORCH_DATA", raising=False)
    monkeypatch.setattr(omniglot, "default_cache_dir", lambda: tmp_path / "user")
    with pytest.raises(DatasetError, match=r"user/omniglot', which does not exist.*HYPERTORCH_DATA"):
        Omniglot(split="meta_train")


def test_download_fetches_only_what_is_missing(small_root, small_partition, monkeypatch):
    asked = []
    monkeypatch.setattr(
        omniglot, "download_omniglot", lambda root, *, progress, files: asked.append((root, set(files)))
    )
    Omniglot(small_root, split="meta_train", download=True, cache_dir=small_root / "cache")
    assert asked == [(small_root, {"images_background.zip"})]  # the other part lies there in folders


def test_a_file_as_root_is_refused(small_root):
    with pytest.raises(DatasetError, match=r"`root` is '.*images_background.zip', a file: the folder"):
        Omniglot(small_root / "images_background.zip", split="meta_train")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"split": "background"}, ValueError, r"`split` is 'background'"),
        ({"partition": "mine"}, ValueError, r"`partition` is 'mine'"),
        ({"rotations": [45]}, ValueError, r"`rotations` is \[45\]: only whole quarter turns.*Use True, False"),
        ({"rotations": []}, ValueError, r"`rotations` is \[\]"),
        ({"rotations": [90, 90]}, ValueError, r"`rotations` is \[90, 90\]"),
        ({"rotations": 90}, ValueError, r"`rotations` is 90"),
        ({"image_size": 0}, ValueError, r"`image_size` must be at least 1, got 0"),
    ],
)
def test_unknown_settings_are_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        Omniglot(tmp_path, **({"split": "meta_train"} | changes))


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """A cache that the tests on real data share, so that everything is decoded once."""
    return tmp_path_factory.mktemp("omniglot")


@pytest.mark.data
@pytest.mark.parametrize(
    ("partition", "sizes"),
    [("vinyals", (1028, 172, 423)), pytest.param("lake", (792, 172, 659), marks=pytest.mark.slow)],
)
def test_real_splits(decoded, partition, sizes):
    root = real_data("omniglot")
    splits = [
        Omniglot(root, split=split, partition=partition, cache_dir=decoded)
        for split in ("meta_train", "meta_val", "meta_test")
    ]
    assert tuple(split.num_classes for split in splits) == tuple(4 * size for size in sizes)
    assert all(set(split.counts) == {20} for split in splits)
    characters = [{name.split("/rot")[0] for name in split.class_names} for split in splits]
    assert tuple(map(len, characters)) == sizes
    assert not characters[0] & characters[1]
    assert not (characters[0] | characters[1]) & characters[2]


@pytest.mark.data
def test_real_drawings_equal_an_independent_decoding(decoded):
    root = real_data("omniglot")
    everything = Omniglot(
        root, split="meta_train+meta_val+meta_test", partition="lake", rotations=False, cache_dir=decoded
    )
    assert everything.num_classes == 964 + 659
    with np.load(root / "omniglot28.npz") as expected:
        np.testing.assert_array_equal(everything.images[:, 0], expected["images"])
        alphabets = expected["alphabet_names"][expected["alphabet"][::20]]
        numbers = expected["character"][::20] + 1
    names = tuple(f"{alphabet}/character{number:02d}" for alphabet, number in zip(alphabets, numbers, strict=True))
    assert everything.class_names == names


@pytest.mark.data
def test_real_episodes(decoded):
    dataset = Omniglot(real_data("omniglot"), split="meta_train", cache_dir=decoded)
    episode = EpisodeSampler(dataset, way=20, shot=5, num_queries=15, num_tasks=2).at(0)
    assert episode.support.inputs.shape == (2, 100, 1, 28, 28)
    assert episode.query.inputs.max() == 1.0
