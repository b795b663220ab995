"""Laws of sampling on real and drawn images: disjoint splits, bytes in memory, one gather, the same in any worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from hypertorch.fewshot import (
    CIFARFS,
    Augmentation,
    Episode,
    EpisodeSampler,
    EpisodeSource,
    ImageClasses,
    Normalisation,
    Omniglot,
    Sinusoid,
    StrokeCharacters,
)
from tests.helpers.data import real_data

SPLITS = ("meta_train", "meta_val", "meta_test")


def strokes(split: str) -> ImageClasses:
    return StrokeCharacters(split=split, num_classes=12, drawings=12, cache_dir=_cache_dir())


def omniglot(split: str) -> ImageClasses:
    return Omniglot(real_data("omniglot"), split=split, cache_dir=_cache_dir())


def cifar_fs(split: str) -> ImageClasses:
    return CIFARFS(real_data("cifar100"), split=split, cache_dir=_cache_dir())


_decoded: list[Path] = []


def _cache_dir() -> Path:
    return _decoded[0]


@pytest.fixture(scope="module", autouse=True)
def _decoded_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    _decoded[:] = [tmp_path_factory.mktemp("decoded")]
    of_split.cache_clear()


@cache
def of_split(name: str, split: str) -> ImageClasses:
    return DATA_SETS[name](split)


DATA_SETS = {"strokes": strokes, "omniglot": omniglot, "CIFAR-FS": cifar_fs}
# Splits of Omniglot are compared, character by character, in the tests of that data set; one is decoded here.
EACH = ["strokes", *(pytest.param(name, marks=pytest.mark.data) for name in ("omniglot", "CIFAR-FS"))]
EACH_SPLIT = [
    *(("strokes", split) for split in SPLITS),
    pytest.param("omniglot", "meta_val", marks=pytest.mark.data),
    *(pytest.param("CIFAR-FS", split, marks=pytest.mark.data) for split in SPLITS),
]


def numbered(num_classes: int = 8, per_class: int = 10) -> ImageClasses:
    images = torch.arange(num_classes * per_class, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 3)
    names = tuple(f"class{number}" for number in range(num_classes))
    return ImageClasses(images=images, counts=(per_class,) * num_classes, class_names=names)


def sampler(dataset: ImageClasses, **changes: object) -> EpisodeSampler:
    settings: dict = {"way": 5, "shot": 1, "num_queries": 4, "num_tasks": 3, "seed": 7}
    return EpisodeSampler(dataset, **{**settings, **changes})


def equal(first: Episode, second: Episode) -> bool:
    pairs = zip((*first.support, *first.query), (*second.support, *second.query), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# Shapes, labels and disjointness, on what is really there.


@pytest.mark.parametrize(("name", "split"), EACH_SPLIT)
def test_episodes_of_every_split_keep_the_laws(name: str, split: str) -> None:
    dataset = of_split(name, split)
    source = sampler(dataset, way=5, shot=2, num_queries=5, num_tasks=4)
    owner = np.repeat(np.arange(dataset.num_classes), dataset.counts_array)
    shape = dataset.item_shape
    for step in range(5):
        episode, rows = source.at(step), source.rows(step)
        assert episode.support.inputs.shape == (4, 10, *shape) and episode.query.inputs.shape == (4, 25, *shape)
        assert episode.query.inputs.min() >= 0.0 and episode.query.inputs.max() <= 1.0
        for part, chosen, per_class in ((episode.support, rows[:, :, :2], 2), (episode.query, rows[:, :, 2:], 5)):
            # Labels are 0 .. way - 1 whatever the classes are, and inputs are the images of the rows.
            assert torch.equal(part.targets, torch.arange(5).repeat_interleave(per_class).expand(4, -1))
            images = dataset.images[torch.from_numpy(chosen.reshape(4, -1))]
            assert torch.equal(part.inputs, images.to(torch.float32) / 255)
        for task in rows:
            classes = owner[task]
            assert (classes == classes[:, :1]).all() and len(set(classes[:, 0])) == 5
            assert len(set(task.ravel())) == task.size  # support and query share no image


@pytest.mark.parametrize("name", ["strokes", pytest.param("CIFAR-FS", marks=pytest.mark.data)])
def test_no_class_is_in_two_splits(name: str) -> None:
    """Names, and what they stand for: the first images of all classes differ."""
    names = [set(of_split(name, split).class_names) for split in SPLITS]
    assert all(names) and len(set.union(*names)) == sum(map(len, names))
    first = [
        image.numpy().tobytes() for split in SPLITS for image in of_split(name, split).images[_starts(name, split)]
    ]
    assert len(set(first)) == len(first) == sum(map(len, names))


def _starts(name: str, split: str) -> torch.Tensor:
    return torch.from_numpy(of_split(name, split).starts)


@pytest.mark.parametrize("name", EACH)
def test_the_class_with_too_few_images_is_named(name: str) -> None:
    dataset = of_split(name, "meta_val")
    counts = (dataset.counts[0], 3, *dataset.counts[2:])
    kept = torch.cat([dataset.images[: counts[0] + 3], dataset.images[sum(dataset.counts[:2]) :]])
    fewer = ImageClasses(images=kept, counts=counts, class_names=dataset.class_names)
    name_of_it = dataset.class_names[1]
    with pytest.raises(ValueError, match=r"`shot \+ num_queries` is 1 \+ 4 = 5, but class '.*' has 3 images") as caught:
        sampler(fewer)
    assert repr(name_of_it) in str(caught.value) and "\n" not in str(caught.value)


# Bytes in memory, and one gather.


@pytest.mark.parametrize("name", EACH)
def test_images_live_in_memory_as_bytes(name: str) -> None:
    dataset = of_split(name, "meta_val")
    assert dataset.images.dtype == torch.uint8 and dataset.images.is_contiguous()
    assert dataset.images.nbytes == sum(dataset.counts) * int(np.prod(dataset.item_shape))
    source = sampler(dataset)
    source.at(0)
    tensors = [value for value in vars(source).values() if isinstance(value, torch.Tensor)]
    tensors += [value for value in vars(dataset).values() if isinstance(value, torch.Tensor)]
    assert [tensor.dtype for tensor in tensors] == [torch.uint8]  # no second copy, as floats
    assert source.dataset is dataset


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes_gathered: list[int] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        if func.overloadpacket.__name__ == "index_select":
            assert result.dtype == torch.uint8
            self.bytes_gathered.append(result.nbytes)
        return result


def operations(**changes: object) -> Operations:
    source = sampler(numbered(20, 12), **changes)
    with Operations() as counted:
        source.at(3)
    return counted


GATHERS = ("index_select", "index", "gather", "take", "cat", "stack", "select")


@pytest.mark.parametrize("changes", [{}, {"way": 20, "shot": 5, "num_queries": 7, "num_tasks": 32}, {"num_tasks": 1}])
def test_a_batch_of_episodes_is_one_gather_of_bytes(changes: dict) -> None:
    counted = operations(**changes)
    assert {name: counted.counts[name] for name in GATHERS if counted.counts[name]} == {"index_select": 1}
    size = {"way": 5, "shot": 1, "num_queries": 4, "num_tasks": 3, **changes}
    items = size["num_tasks"] * size["way"] * (size["shot"] + size["num_queries"])
    assert counted.bytes_gathered == [items * 6]  # images of 1 x 2 x 3 bytes, none more than needed


def test_the_work_for_a_batch_does_not_grow_in_operations() -> None:
    """The same list of operations for one image per class and for thousands: no Python loop over images."""
    least = operations(way=2, num_queries=1, num_tasks=1).counts
    assert operations(way=20, shot=5, num_queries=7, num_tasks=64).counts == least
    assert sum(least.values()) < 30


def test_augmentation_adds_a_fixed_number_of_operations() -> None:
    changes = {
        "augmentation": Augmentation(crop_padding=1, flip=True, brightness=0.1, contrast=0.1),
        "normalisation": Normalisation(mean=(0.5,), std=(0.5,)),
    }
    few, many = operations(num_tasks=1, **changes).counts, operations(num_tasks=64, **changes).counts
    assert few == many
    assert many["index_select"] == 1


@pytest.mark.cuda
def test_images_on_the_gpu_are_gathered_there() -> None:
    source = sampler(numbered(20, 12).to("cuda"))
    assert source.dataset.images.is_cuda
    with Operations() as counted:
        episode = source.at(3)
    assert all(tensor.is_cuda for tensor in (*episode.support, *episode.query))
    assert counted.counts["index_select"] == 1


# The same episodes for a seed, whoever draws them.


class Batches(Dataset):
    """A stream of episodes as PyTorch's loaders know it: item `i` is the batch of outer step `i`."""

    def __init__(self, source: EpisodeSource, length: int) -> None:
        self.source = source
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> Episode:
        return self.source.at(step)


SOURCES = {
    "images": lambda: sampler(numbered()),
    "augmented": lambda: sampler(numbered(), augmentation=Augmentation(crop_padding=1, flip=True, brightness=0.2)),
    "sinusoids": lambda: Sinusoid(num_tasks=3, shot=5, num_queries=4, seed=7),
}


# Three workers on a machine of two cores are what is wanted here.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("name", SOURCES)
def test_workers_of_a_loader_give_the_same_episodes(name: str) -> None:
    source, length = SOURCES[name](), 7
    expected = [source.at(step) for step in range(length)]
    for num_workers in (0, 1, 3):
        torch.manual_seed(num_workers)  # from which a loader seeds its workers; episodes must not notice
        loader = DataLoader(Batches(source, length), batch_size=None, num_workers=num_workers)
        loaded = [Episode(*batch) for batch in loader]
        assert len(loaded) == length and all(map(equal, loaded, expected))


def test_a_shuffling_loader_gives_the_same_episodes_in_another_order() -> None:
    source = sampler(numbered())
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(Batches(source, 6), batch_size=None, sampler=order, num_workers=1)
    assert all(equal(Episode(*batch), source.at(step)) for step, batch in zip(order, loader, strict=True))


def test_what_is_done_to_images_does_not_change_which_are_drawn() -> None:
    plain = sampler(numbered())
    others = [
        sampler(numbered(), dtype=torch.float64),
        sampler(numbered(), augmentation=Augmentation(flip=True)),
        sampler(numbered(), normalisation=Normalisation(mean=(0.5,), std=(0.5,))),
    ]
    for other in others:
        assert all(np.array_equal(plain.rows(step), other.rows(step)) for step in range(5))
