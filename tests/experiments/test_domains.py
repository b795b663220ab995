"""Domains for few-shot learning: embedded ones that look different, and those that are read from folders."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets.domains import PARTS, load_domain
from hypertorch.fewshot import StrokeCharacters
from tests.helpers.data import real_data

EMBEDDED = ("strokes", "inverted", "blurred", "bold", "digits")


@pytest.mark.parametrize("name", EMBEDDED)
def test_parts_have_no_image_in_common(name: str) -> None:
    domain = load_domain(name, None)
    assert tuple(domain) == PARTS
    for classes in domain.values():
        assert classes.item_shape == (1, 28, 28) and min(classes.counts) >= 6
    for one, other in combinations(domain.values(), 2):
        assert not set(one.class_names) & set(other.class_names)
        seen = {bytes(image) for image in one.images.flatten(1).numpy()}
        assert not any(bytes(image) in seen for image in other.images.flatten(1).numpy())


def test_characters_are_changed_as_the_name_says() -> None:
    def drawn(seed: int) -> torch.Tensor:
        return StrokeCharacters(split="meta_val", num_classes=20, seed=seed).images

    assert torch.equal(load_domain("strokes", None)["meta_val"].images, drawn(0))
    assert torch.equal(load_domain("inverted", None)["meta_val"].images, 255 - drawn(1))
    ink = {name: float(load_domain(name, None)["meta_val"].images.float().mean()) for name in EMBEDDED}
    assert ink["bold"] > 1.5 * float(drawn(3).float().mean()) and ink["inverted"] > 128.0 > ink["strokes"]
    assert ink["blurred"] == pytest.approx(float(drawn(2).float().mean()), rel=0.02)


def test_digits_are_those_of_the_scans() -> None:
    domain = load_domain("digits", None)
    assert [classes.num_classes for classes in domain.values()] == [10, 10, 10]
    _, labels = load_digits(return_X_y=True)
    assert sum(sum(classes.counts) for classes in domain.values()) == len(labels)
    counts = [sum(parts) for parts in zip(*(classes.counts for classes in domain.values()), strict=True)]
    assert counts == [int((labels == digit).sum()) for digit in range(10)]


@pytest.mark.parametrize("name", ["omniglot", "mnist", "cifar100"])
def test_others_are_read_from_their_folders(name: str) -> None:
    domain = load_domain(name, str(real_data(name).parent))
    assert tuple(domain) == PARTS
    assert all(classes.item_shape == (1, 28, 28) for classes in domain.values())
    assert {"omniglot": 423, "mnist": 10, "cifar100": 20}[name] == domain["meta_test"].num_classes


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpectedFailure, match="`experiment.domains` has 'letters', which names no images"):
        load_domain("letters", None)
    with pytest.raises(ExpectedFailure, match="`experiment.root` is null, but the domain 'omniglot'"):
        load_domain("omniglot", None)
    with pytest.raises(ExpectedFailure, match="but omniglot cannot be read there"):
        load_domain("omniglot", str(tmp_path))
    with pytest.raises(ExpectedFailure, match="cannot be read there"):
        load_domain("mnist", str(tmp_path))
