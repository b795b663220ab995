"""Features of photographs: of a network that sees no image of their classes, kept until what they depend on changes."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets import cifar_features
from experiments.common.data_sets.cifar_features import cifar100_features, features, trained_network
from hypertorch.errors import DatasetError
from hypertorch.fewshot import ImageClasses
from tests.helpers.data import real_data


def coloured(split: str, num_classes: int, seed: int) -> ImageClasses:
    """Noise of a colour of its own for each class."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(60, 196, (num_classes, 1, 3, 1, 1), generator=generator)
    noise = torch.randint(-60, 60, (num_classes, 6, 3, 32, 32), generator=generator)
    return ImageClasses(
        images=(colours + noise).to(torch.uint8).flatten(0, 1),
        counts=(6,) * num_classes,
        class_names=tuple(f"{split} {number}" for number in range(num_classes)),
        source="coloured",
        split=split,
    )


class Parts:
    """In place of CIFAR-FS: three classes to train on, two and four others; counts the networks that are trained."""

    def __init__(self) -> None:
        self.sizes = {"meta_train": 3, "meta_val": 2, "meta_test": 4}
        self.found = {part: coloured(part, size, seed) for seed, (part, size) in enumerate(self.sizes.items())}
        self.trained_on: list[ImageClasses] = []

    def read(self, root: str, *, split: str) -> ImageClasses:
        return self.found[split]

    def train(self, classes: ImageClasses, num_epochs: int) -> nn.Sequential:
        self.trained_on.append(classes)
        return trained_network(classes, num_epochs)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    parts = Parts()
    monkeypatch.setattr(cifar_features, "CIFARFS", parts.read)
    monkeypatch.setattr(cifar_features, "trained_network", parts.train)
    return parts


def test_the_network_sees_no_image_of_the_classes_whose_features_it_gives(parts: Parts, tmp_path: Path) -> None:
    found, names = cifar100_features("root", "meta_test", num_epochs=1, folder=tmp_path)
    assert parts.trained_on == [parts.found["meta_train"]]
    assert names == parts.found["meta_test"].class_names and found.shape == (4, 6, 128 + 256)
    network = trained_network(parts.found["meta_train"], 1)
    for place in range(4):
        torch.testing.assert_close(found[place], features(network, parts.found["meta_test"].images[6 * place :][:6]))
    others, _ = cifar100_features("root", "meta_val", num_epochs=1, folder=tmp_path)
    torch.testing.assert_close(others.flatten(0, 1), features(network, parts.found["meta_val"].images))


def test_features_are_kept_until_something_that_they_depend_on_changes(parts: Parts, tmp_path: Path) -> None:
    def trained(num_epochs: int = 1) -> int:
        before = len(parts.trained_on)
        for part in ("meta_val", "meta_test"):
            cifar100_features("root", part, num_epochs=num_epochs, folder=tmp_path)
        return len(parts.trained_on) - before

    assert [trained(), trained()] == [1, 0]
    assert [trained(num_epochs=2), trained()] == [1, 0]
    for part in ("meta_train", "meta_test"):
        parts.found[part] = coloured(part, parts.sizes[part], seed=9)
        assert [trained(), trained()] == [1, 0]
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4 and all(path.suffix == ".safetensors" for path in kept)
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1])
    assert trained() == 1


def test_features_are_means_over_the_image_of_the_last_two_blocks() -> None:
    network, images = trained_network(coloured("train", 2, seed=0), 1), coloured("test", 2, seed=1).images
    outputs = [images.float() / 127.5 - 1.0]
    with torch.no_grad():
        outputs += [network[: place + 1](outputs[0]) for place in range(4)]
    expected = torch.cat([outputs[3].mean(dim=(2, 3)), outputs[4].mean(dim=(2, 3))], dim=1)
    torch.testing.assert_close(features(network, images), expected)
    # What one image gives does not depend on which others are beside it.
    torch.testing.assert_close(features(network, images)[:1], features(network, images[:1]))


def test_training_is_the_same_every_time_and_tells_classes_apart() -> None:
    classes = coloured("train", 3, seed=0)
    before = torch.get_rng_state()
    once, again = (trained_network(classes, 15) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one, other) for one, other in zip(once.parameters(), again.parameters(), strict=True))
    found = features(once, classes.images).reshape(3, 6, -1)
    within = (found - found.mean(dim=1, keepdim=True)).norm(dim=2).mean()
    assert float(torch.pdist(found.mean(dim=1)).min()) > 3.0 * float(within)


def test_every_image_is_shifted_and_mirrored_by_its_own_draw() -> None:
    images = torch.randint(256, (40, 3, 6, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    changed = cifar_features._changed(images, torch.Generator().manual_seed(1))
    draws = [draw(image, new) for image, new in zip(images, changed, strict=True)]
    down, right, mirrored = zip(*draws, strict=True)
    assert set(mirrored) == {False, True} and 10 <= sum(mirrored) <= 30
    assert len(set(down)) >= 8 and len(set(right)) >= 8 and down != right


def draw(image: Tensor, new: Tensor) -> tuple[int, int, bool]:
    """How far the image was moved in both directions, and whether it was mirrored."""
    for mirrored in (False, True):
        padded = F.pad(image.flip(-1) if mirrored else image, (4, 4, 4, 4))
        for down, right in product(range(9), range(9)):
            if torch.equal(new, padded[:, down : down + 6, right : right + 6]):
                return down, right, mirrored
    raise AssertionError("no shift of the image")


def test_what_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExpectedFailure, match="`experiment.root` is null, but photographs are"):
        cifar100_features(None, "meta_test", num_epochs=1)
    with pytest.raises(ExpectedFailure, match="`experiment.classes` is 'meta_train', which names no classes"):
        cifar100_features("root", "meta_train", num_epochs=1)  # type: ignore[arg-type]

    def missing(root: str, *, split: str) -> ImageClasses:
        raise DatasetError("nothing is there.")

    monkeypatch.setattr(cifar_features, "CIFARFS", missing)
    with pytest.raises(ExpectedFailure, match="`experiment.root` is 'nowhere', but CIFAR-100 .* nothing is there"):
        cifar100_features("nowhere", "meta_test", num_epochs=1)


@pytest.mark.slow
def test_the_classes_of_cifar_are_those_of_cifar_fs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The network is left out: training it takes minutes."""
    root = real_data("cifar100")

    def untrained(classes: ImageClasses, num_epochs: int) -> nn.Sequential:
        assert (classes.num_classes, classes.split) == (64, "meta_train")
        return nn.Sequential(nn.AvgPool2d(16), nn.AvgPool2d(2))

    monkeypatch.setattr(cifar_features, "trained_network", untrained)
    val, test = (
        cifar100_features(str(root), part, num_epochs=1, folder=tmp_path) for part in ("meta_val", "meta_test")
    )
    assert val[0].shape == (16, 600, 6) and test[0].shape == (20, 600, 6)
    assert not set(val[1]) & set(test[1]) and {"rose", "poppy", "man", "woman"} <= set(test[1])
