"""Classes of items that are no images, and the episodes drawn from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypertorch.fewshot import Augmentation, EpisodeSampler, ImageClasses, Normalisation, TensorClasses
from tests.helpers.problems import normal

COUNTS = (4, 6, 5)


def numbered(dtype: torch.dtype = torch.float64) -> TensorClasses:
    """Items of shape (2,) that show their class and their position in it."""
    return TensorClasses.of({
        f"class {number}": torch.stack([torch.full((count,), number), torch.arange(count)], dim=1).to(dtype)
        for number, count in enumerate(COUNTS)
    })  # fmt: skip


def sampler(dataset: Any, **changes: Any) -> EpisodeSampler:
    return EpisodeSampler(dataset, **{"way": 2, "shot": 1, "num_queries": 3, "num_tasks": 5, "seed": 3, **changes})


def test_a_dictionary_is_sorted_by_class() -> None:
    dataset = numbered()
    assert (dataset.counts, dataset.class_names) == (COUNTS, ("class 0", "class 1", "class 2"))
    assert dataset.items.shape == (15, 2) and dataset.item_shape == (2,)
    assert dataset.items[:, 0].tolist() == [0.0] * 4 + [1.0] * 6 + [2.0] * 5
    assert repr(dataset) == "TensorClasses(classes=3, items=15, item_shape=(2,))"
    moved = TensorClasses.of({"a": torch.zeros(2, 1)}, source="Iris", split="meta_val").to("meta")
    assert repr(moved) == "Iris(split='meta_val', classes=1, items=2, item_shape=(1,))"
    assert moved.items.device.type == "meta"


def test_episodes_are_those_of_images_of_the_same_counts() -> None:
    """The choice depends on the counts alone; the items come as they are."""
    dataset = numbered()
    images = dataset.items.to(torch.uint8).reshape(15, 1, 1, 2)
    pictures = sampler(ImageClasses(images=images, counts=COUNTS, class_names=dataset.class_names))
    for step in (0, 7):
        ours, theirs = sampler(dataset, dtype=torch.float64).at(step), pictures.at(step)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine.targets, other.targets)
            assert torch.equal(mine.inputs, (other.inputs.double() * 255).round().reshape(mine.inputs.shape))
            shown = mine.inputs[..., 0].reshape(5, 2, -1)
            assert bool((shown == shown[..., :1]).all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integers_stay_as_they_are(dtype: torch.dtype) -> None:
    large = TensorClasses(items=numbered(dtype).items + 2**30 + 1, counts=COUNTS, class_names=("a", "b", "c"))
    inputs = sampler(large).at(0).query.inputs
    assert inputs.dtype == dtype
    assert set((inputs - 2**30 - 1).flatten().tolist()) <= set(range(6))


def test_floats_come_in_the_type_asked_for() -> None:
    assert sampler(numbered()).at(0).support.inputs.dtype == torch.float32
    assert sampler(numbered(), dtype=torch.float64).at(0).support.inputs.dtype == torch.float64
    assert sampler(numbered(), num_queries=2).at(1).query.inputs.shape == (5, 4, 2)


@pytest.mark.parametrize("changes", [{"augmentation": Augmentation(flip=True)},
                                     {"normalisation": Normalisation(mean=(0.5,), std=(1.0,))}])  # fmt: skip
def test_what_is_for_images_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(TypeError, match=rf"`{name}` is .*, but `dataset` is TensorClasses\(classes=3.* no images"):
        sampler(numbered(), **changes)


def test_too_few_items_are_named_as_items() -> None:
    with pytest.raises(ValueError, match="class 'class 0' has 4 items: support and query share no item"):
        sampler(numbered(), num_queries=4)


def test_another_kind_of_data_is_told_what_to_pass() -> None:
    with pytest.raises(
        TypeError, match=r"`dataset` is a Tensor, not a `Classes`: .*`TensorClasses.of\(\{name: tensor, ...\}\)`"
    ):
        sampler(normal(3, 4, 5, seed=1))


@pytest.mark.parametrize(
    ("per_class", "error", "message"),
    [
        (normal(3, 4, 5, seed=1), TypeError, "`per_class` is a Tensor that is no dictionary of tensors"),
        ({"a": [1.0]}, TypeError, "`per_class` is a dict that is no dictionary of tensors"),
        ({}, ValueError, "`per_class` is empty"),
        (
            {"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)},
            ValueError,
            r"`per_class\['b'\]` has items of shape \(4,\) .*`per_class\['a'\]` has shape \(3,\).*Pad or convert",
        ),
        (
            {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3, dtype=torch.int64)},
            ValueError,
            "has items of .*torch.int64 .*torch.float32",
        ),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(0, 3)}, ValueError, r"`counts` is \(2, 0\): every class needs an"),
        ({"a": torch.zeros(2)}, ValueError, r"`items` has shape \(2,\).*`items.unsqueeze\(1\)`"),
        ({"a": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "`items` is torch.uint8: .*`ImageClasses`"),
        ({"a": torch.zeros(2, 3, dtype=torch.complex64)}, TypeError, "`items` is torch.complex64"),
    ],
)
def test_what_does_not_fit_is_refused(per_class: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TensorClasses.of(per_class)


def test_items_are_told_from_a_list() -> None:
    items: Tensor = [1.0, 2.0]  # type: ignore[assignment]
    with pytest.raises(TypeError, match="`items` is a list"):
        TensorClasses(items=items, counts=(2,), class_names=("a",))
    with pytest.raises(ValueError, match="`counts` sums to 3, but `items` has 2 rows: each item belongs.*Sort `items`"):
        TensorClasses(items=torch.zeros(2, 2), counts=(3,), class_names=("a",))
