import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypertorch.fewshot.augmentation import Augmentation
from hypertorch.fewshot.datasets.image_classes import ImageClasses
from hypertorch.fewshot.sampler import EpisodeSampler

CHECKOUT = Path(__file__).resolve().parents[2]


def numbered_classes(*counts: int) -> ImageClasses:
    """Classes whose images show class and position: pixel (0, 0) is the class, pixel (0, 1) the position in it."""
    images = torch.zeros(sum(counts), 1, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images[:, 0, 0, 1] = torch.cat([torch.arange(count) for count in counts])
    return ImageClasses(images=images, counts=counts, class_names=tuple(f"class{i}" for i in range(len(counts))))


def sampler(dataset=None, **settings_):
    chosen = {"way": 3, "shot": 2, "num_queries": 4, "num_tasks": 5, "seed": 7} | settings_
    return EpisodeSampler(numbered_classes(*[10] * 8) if dataset is None else dataset, **chosen)


def equal(first, second):
    pairs = zip((*first.support, *first.query), (*second.support, *second.query), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_shapes_types_and_range():
    episode = sampler().at(0)
    assert episode.support.inputs.shape == (5, 6, 1, 2, 3)
    assert episode.query.inputs.shape == (5, 12, 1, 2, 3)
    assert episode.support.targets.shape == (5, 6)
    assert episode.query.targets.shape == (5, 12)
    assert episode.support.inputs.dtype == torch.float32
    assert episode.support.targets.dtype == torch.int64
    assert episode.support.inputs.is_contiguous()
    assert episode.query.inputs.is_contiguous()


def test_inputs_are_bytes_over_255():
    white = ImageClasses(images=torch.full((8, 1, 1, 1), 255, dtype=torch.uint8), counts=(4, 4), class_names=("a", "b"))
    episode = EpisodeSampler(white, way=2, shot=1, num_queries=1, num_tasks=1, dtype=torch.float64).at(0)
    assert episode.query.inputs.dtype == torch.float64
    assert episode.query.inputs.unique().tolist() == [1.0]
    source = sampler()
    expected = source.dataset.images[torch.from_numpy(source.rows(3)[:, :, 2:]).reshape(5, 12)].double() / 255
    assert torch.equal(source.at(3).query.inputs, expected.float())


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(5, 12), min_size=3, max_size=9),
    way=st.integers(2, 3),
    shot=st.integers(1, 2),
    num_queries=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
)
def test_every_episode_is_well_formed(counts, way, shot, num_queries, seed, step):
    dataset = numbered_classes(*counts)
    source = sampler(dataset, way=way, shot=shot, num_queries=num_queries, seed=seed)
    support, query = source.at(step)
    shown = {"support": support, "query": query}
    classes, positions = {}, {}
    for name, examples in shown.items():
        pixels = (examples.inputs[:, :, 0, 0, :2] * 255).round().long().reshape(5, way, -1, 2)
        assert (pixels[..., 0] == pixels[:, :, :1, 0]).all()  # each label is one class
        classes[name], positions[name] = pixels[:, :, 0, 0], pixels[..., 1]
        labels = examples.targets.reshape(5, way, -1)
        assert torch.equal(labels, torch.arange(way)[None, :, None].expand_as(labels))
    assert torch.equal(classes["support"], classes["query"])
    assert all(len(row.unique()) == way for row in classes["support"])
    drawn = torch.cat([positions["support"], positions["query"]], dim=-1).reshape(-1, shot + num_queries)
    assert all(len(row.unique()) == shot + num_queries for row in drawn)  # support and query are disjoint
    assert (drawn < torch.tensor(counts)[classes["support"].reshape(-1)][:, None]).all()


def test_all_images_of_a_class_may_be_used():
    episode = sampler(numbered_classes(6, 6, 6)).at(3)
    pixels = torch.cat([episode.support.inputs.reshape(5, 3, 2, 6), episode.query.inputs.reshape(5, 3, 4, 6)], dim=2)
    positions = (pixels[..., 1] * 255).round().sort(dim=-1).values
    assert torch.equal(positions, torch.arange(6.0).expand(5, 3, 6))


def test_classes_images_and_labels_are_drawn_uniformly():
    source = sampler(numbered_classes(8, 9, 10, 11), way=2, shot=1)
    rows = np.stack([source.rows(step) for step in range(600)])
    classes = np.searchsorted([8, 17, 27], rows[..., 0], side="right")
    # 6,000 draws of one class out of four: 6 standard deviations are 201.
    assert np.abs(np.bincount(classes.ravel()) - 1500).max() < 201
    for label in range(2):
        assert np.abs(np.bincount(classes[:, :, label].ravel()) - 750).max() < 143
    largest = rows[..., 0][classes == 3] - 27
    assert np.abs(np.bincount(largest) - len(largest) / 11).max() < 6 * np.sqrt(len(largest) / 11)


def test_the_indices_of_a_seed_never_change():
    # Literals on purpose: a run has to see the same episodes on every platform and after every upgrade.
    rows = sampler(numbered_classes(3, 4, 5, 6), way=2, shot=1, num_queries=2, num_tasks=2, seed=2024).rows(11)
    assert rows.tolist() == GOLDEN


def test_the_changes_of_a_seed_never_change():
    # The seeds of the generator that augmentation draws from, by step: literals for the same reason.
    found = []

    class Noting(Augmentation):
        def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            found.append(generator.initial_seed())
            return images

    source = sampler(seed=2024, augmentation=Noting())
    source.at(0)
    source.at(11)
    assert found == [963246794032160555, 2859953030061303951]


GOLDEN = [[[6, 5, 4], [2, 0, 1]], [[17, 14, 13], [7, 10, 9]]]


def test_order_of_access_does_not_matter():
    source = sampler()
    forwards = [source.at(step) for step in range(6)]
    backwards = [source.at(step) for step in reversed(range(6))][::-1]
    assert all(map(equal, forwards, backwards))
    assert equal(source.at(10**12), sampler().at(10**12))


def test_threads_and_processes_see_the_same_episodes():
    expected = [sampler().rows(step) for step in range(20)]
    source = sampler()
    with ThreadPoolExecutor(4) as pool:
        assert all(map(np.array_equal, pool.map(source.rows, range(20)), expected))
    program = (
        "import torch\n"
        "torch.manual_seed(123)\n"
        "from hypertorch.fewshot.sampler import EpisodeSampler\n"
        "from hypertorch.fewshot.datasets.image_classes import ImageClasses\n"
        "data = ImageClasses(images=torch.zeros(80, 1, 2, 3, dtype=torch.uint8), counts=[10] * 8,"
        " class_names=list('abcdefgh'))\n"
        "print(EpisodeSampler(data, way=3, shot=2, num_queries=4, num_tasks=5, seed=7).rows(19).tolist())\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT
    ).stdout
    assert printed.strip() == str(expected[19].tolist())


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampler().at(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert equal(sampler().at(0), first)


def test_seeds_and_steps_give_different_episodes():
    rows = {sampler(seed=seed).rows(step).tobytes() for seed in range(5) for step in range(5)}
    assert len(rows) == 25


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_gets_the_same_episodes():
    dataset = numbered_classes(*[10] * 8)
    on_gpu = sampler(dataset).to("cuda").at(4)
    assert on_gpu.query.inputs.device.type == "cuda"
    assert on_gpu.query.targets.device.type == "cuda"
    moved = [tensor.cpu() for tensor in (*on_gpu.support, *on_gpu.query)]
    expected = sampler(dataset).at(4)
    assert all(torch.equal(a, b) for a, b in zip(moved, (*expected.support, *expected.query), strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"way": 9}, ValueError, r"`way` is 9, but `dataset` has 8 classes.*at most 8"),
        ({"way": 1}, ValueError, r"`way` must be at least 2, got 1: one class.*Use 2 or more"),
        ({"way": 5.0}, TypeError, r"`way` is 5.0, a float: it is a count, so a whole number. Pass an integer"),
        ({"way": True}, TypeError, r"`way` is True, a bool: it is a count"),
        ({"shot": 1.5}, TypeError, r"`shot` is 1.5, a float: it is a count, so a whole number. Pass an integer"),
        ({"shot": 0}, ValueError, r"`shot` must be at least 1, got 0: without support.*Use 1"),
        ({"num_queries": 0}, ValueError, r"`num_queries` must be at least 1, got 0: without query.*Use 1"),
        ({"num_tasks": 0}, ValueError, r"`num_tasks` must be at least 1, got 0: a batch.*Use 1"),
        ({"num_tasks": True}, TypeError, r"`num_tasks` is True, a bool: it is a count"),
        (
            {"augmentation": "flip"},
            TypeError,
            r"`augmentation` is 'flip', not an `Augmentation`: .*Pass one, such as `Augmentation",
        ),
        (
            {"normalisation": (0.5, 0.25)},
            TypeError,
            r"`normalisation` is \(0.5, 0.25\), not a `Normalisation`: .*`Normalisation",
        ),
        ({"seed": -1}, ValueError, r"`seed` must be at least 0 and below 2 .* 64, got -1: it keys.*Use for instance"),
        ({"dtype": torch.int64}, TypeError, r"`dtype` is torch.int64: .*floating-point.*torch.float32"),
        ({"shot": 7}, ValueError, r"7 \+ 4 = 11, but class 'class0' has 10 images: .*at most 10"),
    ],
)
def test_impossible_episodes_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        sampler(**changes)


def test_the_smallest_class_is_named():
    with pytest.raises(ValueError, match=r"class 'class2' has 5 images: support and query share no image"):
        sampler(numbered_classes(10, 10, 5, 10))


def test_a_data_set_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"`dataset` is a Tensor, not a `Classes`: .*Pass an `ImageClasses`"):
        sampler(torch.zeros(4))


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (-1, ValueError, r"`step` must be at least 0, got -1: batches are numbered from 0"),
        (0.5, TypeError, r"`step` is 0.5, a float: batches are numbered from 0"),
    ],
)
def test_impossible_steps_are_refused(step, error, message):
    with pytest.raises(error, match=message):
        sampler().at(step)
