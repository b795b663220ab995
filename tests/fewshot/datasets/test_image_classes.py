import pytest
import torch

from hypertorch.fewshot.datasets.image_classes import ImageClasses


def classes(**changes):
    fields = {"images": torch.zeros(5, 1, 4, 4, dtype=torch.uint8), "counts": (2, 3), "class_names": ("a", "b")}
    return ImageClasses(**(fields | changes))


def test_what_it_says_about_itself():
    dataset = classes(counts=[2, 3], class_names=["a", "b"])
    assert dataset.num_classes == 2
    assert dataset.item_shape == (1, 4, 4)
    assert dataset.counts == (2, 3)
    assert dataset.class_names == ("a", "b")
    assert dataset.starts.tolist() == [0, 2]


def test_to_moves_the_images_only():
    moved = classes().to("meta")
    assert moved.images.device.type == "meta"
    assert moved.counts == (2, 3)
    assert moved.class_names == ("a", "b")


def test_its_repr_is_short_and_moves_along():
    assert repr(classes()) == "ImageClasses(classes=2, images=5, item_shape=(1, 4, 4))"
    named = classes(source="Letters", split="meta_val").to("meta")
    assert repr(named) == "Letters(split='meta_val', classes=2, images=5, item_shape=(1, 4, 4))"


def test_images_are_made_contiguous():
    strided = torch.zeros(5, 4, 4, 1, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert classes(images=strided[:, :, ::2]).images.is_contiguous()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(5, 1, 4, 4)}, TypeError, r"`images` is torch.float32: .*bytes.*uint8"),
        ({"images": [1]}, TypeError, r"`images` is list: "),
        ({"images": torch.zeros(5, 4, 4, dtype=torch.uint8)}, ValueError, r"shape \(5, 4, 4\): four axes.*unsqueeze"),
        ({"counts": (2, 2)}, ValueError, r"`counts` sums to 4, but `images` has 5 rows: .*Sort"),
        ({"counts": (5, 0)}, ValueError, r"`counts` is \(5, 0\): every class needs an image.*Leave empty"),
        ({"counts": ()}, ValueError, r"`counts` is \(\): every class"),
        ({"class_names": ("a",)}, ValueError, r"`class_names` has 1 entries, but `counts` has 2: .*same order"),
        ({"class_names": ("a", "a")}, ValueError, r"`class_names` holds 'a' twice: .*Merge"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        classes(**changes)
