"""Augmentation changes each image on its own, as a pure function of seed and step; normalisation is a formula."""

from __future__ import annotations

import pytest
import torch

from hypertorch.fewshot import Augmentation, EpisodeSampler, ImageClasses, Normalisation, StrokeCharacters


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int = 64) -> torch.Tensor:
    return torch.rand(batch, 3, 6, 5, generator=generator(9), dtype=torch.float64)


def test_crops_and_mirrors_are_views_into_the_padded_image() -> None:
    images = pictures()
    changed = Augmentation(crop_padding=2, flip=True)(images, generator())
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    shifts, mirrors = set(), set()
    for before, after in zip(padded, changed, strict=True):
        matches = [
            (row, column, flip)
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
            for crop in [before[:, row : row + 6, column : column + 5]]
            if torch.equal(crop.flip(2) if flip else crop, after)
        ]
        assert len(matches) == 1
        shifts.add(matches[0][:2])
        mirrors.add(matches[0][2])
    assert len(shifts) > 15 and mirrors == {False, True}


def test_which_images_a_seed_mirrors_never_changes() -> None:
    # Literals on purpose: a run has to see the same images after every upgrade.
    images = pictures(12)
    changed = Augmentation(flip=True)(images, generator(2024))
    mirrored = [torch.equal(after, before.flip(2)) for before, after in zip(images, changed, strict=True)]
    assert [number for number, is_mirrored in enumerate(mirrored) if is_mirrored] == [3, 4, 5, 6, 8, 10]


@pytest.mark.parametrize("pad", [1, 2])
def test_every_crop_occurs_equally_often(pad: int) -> None:
    """By the place of a single bright pixel in the middle: all `(2 pad + 1)^2` places, and no other."""
    size, count = 7, 5000
    images = torch.zeros(count, 1, size, size, dtype=torch.float64)
    images[:, :, 3, 3] = 1.0
    moved = Augmentation(crop_padding=pad)(images, generator())
    places = moved.flatten(1).argmax(1)
    assert bool((moved.flatten(1).sum(1) == 1.0).all())
    wanted = {row * size + column for row in range(3 - pad, 4 + pad) for column in range(3 - pad, 4 + pad)}
    drawn = torch.bincount(places, minlength=size * size)
    assert set(drawn.nonzero().flatten().tolist()) == wanted
    share = count / len(wanted)
    assert float((drawn[sorted(wanted)] - share).abs().max()) < 6 * share**0.5


def test_rows_and_columns_are_moved_independently_and_mirrors_too() -> None:
    images = torch.zeros(4000, 1, 5, 5, dtype=torch.float64)
    images[:, :, 2, 1] = 1.0
    moved = Augmentation(crop_padding=1, flip=True)(images, generator())
    drawn = torch.bincount(moved.flatten(1).argmax(1), minlength=25).reshape(5, 5)
    # Columns 0 to 2 as they are, 2 to 4 mirrored; each with rows 1 to 3.
    expected = 4000 / 18 * torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0])
    assert not drawn[0].any() and not drawn[4].any()
    assert float((drawn[1:4] - expected).abs().max()) < 6 * float(expected.max()) ** 0.5
    assert abs(int(drawn[:, :2].sum() - drawn[:, 3:].sum())) < 6 * (4000 * 2 / 3) ** 0.5


def test_colours_change_by_one_factor_per_image() -> None:
    images = 0.4 + 0.1 * pictures()
    brighter = Augmentation(brightness=0.3)(images, generator())
    factors = (brighter / images).flatten(1)
    assert torch.allclose(factors, factors[:, :1]) and factors.min() > 0.7 and factors.max() < 1.3
    assert factors[:, 0].std() > 0.1
    flatter = Augmentation(contrast=0.3)(images, generator())
    centres = images.mean((1, 2, 3), keepdim=True)
    factors = ((flatter - centres) / (images - centres)).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert factors.min() > 0.7 and factors.max() < 1.3 and factors[:, 0].std() > 0.1


def test_nothing_asked_is_nothing_done() -> None:
    images = pictures()
    assert torch.equal(Augmentation()(images, generator()), images)


def test_normalisation_is_its_formula() -> None:
    images = pictures()
    normal = Normalisation(mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])(images)
    torch.testing.assert_close(normal[:, 2], (images[:, 2] - 0.3) / 4.0)


def test_episodes_are_changed_by_seed_and_step_alone() -> None:
    images = (255 * pictures(40)).to(torch.uint8)
    dataset = ImageClasses(images=images, counts=(10,) * 4, class_names=tuple("abcd"))

    def sampler(augmentation: Augmentation | None) -> EpisodeSampler:
        return EpisodeSampler(
            dataset, way=3, shot=1, num_queries=2, num_tasks=2, seed=1, augmentation=augmentation,
            normalisation=Normalisation(mean=(0.5,), std=(0.25,)),
        )  # fmt: skip

    augmented = sampler(Augmentation(crop_padding=1, flip=True))
    first, again, later = augmented.at(0), augmented.at(0), augmented.at(1)
    assert torch.equal(first.query.inputs, again.query.inputs)
    assert not torch.equal(first.query.inputs, later.query.inputs)
    plain = sampler(None).at(0)
    assert torch.equal(plain.query.targets, first.query.targets)
    assert not torch.equal(plain.query.inputs, first.query.inputs)
    assert float(plain.support.inputs.min()) >= -2.0 and float(plain.support.inputs.max()) <= 2.0


def test_the_same_images_are_changed_anew_by_every_seed_and_step() -> None:
    """Of classes that hold one image many times, episodes differ by their augmentation alone."""
    image = (255 * pictures(1)).to(torch.uint8)
    dataset = ImageClasses(images=image.expand(20, -1, -1, -1), counts=(10, 10), class_names=("a", "b"))

    def inputs(step: int, seed: int = 0) -> torch.Tensor:
        sampler = EpisodeSampler(
            dataset, way=2, shot=3, num_queries=4, num_tasks=2, seed=seed,
            augmentation=Augmentation(crop_padding=2, flip=True, brightness=0.2),
        )  # fmt: skip
        episode = sampler.at(step)
        return torch.cat([episode.support.inputs, episode.query.inputs], dim=1).flatten(2)

    batches = [inputs(0), inputs(1), inputs(7), inputs(0, seed=1), inputs(1, seed=1)]
    for number, batch in enumerate(batches):
        assert all(not torch.equal(batch, other) for other in batches[:number])
        rows = batch.flatten(0, 1)
        assert len(rows.unique(dim=0)) > 0.8 * len(rows)  # each image on its own
    assert torch.equal(inputs(7), batches[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_padding": -1}, "`crop_padding` is -1: images are moved"),
        ({"crop_padding": 1.5}, "`crop_padding` is 1.5"),
        ({"brightness": 1.0}, r"`brightness` is 1.0: factors are drawn .*\[0, 1\)"),
        ({"contrast": -0.1}, "`contrast` is -0.1"),
    ],
)
def test_wrong_settings_are_explained(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": "yes"}, "`flip` is 'yes', a str: images are mirrored .*Pass True or False"),
        ({"flip": 1}, "`flip` is 1, a int"),
        ({"brightness": "high"}, r"`brightness` is 'high', a str: .*Pass a number in \[0, 1\)"),
    ],
)
def test_settings_of_a_wrong_type_are_explained(settings: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Augmentation(**settings)


def test_padding_that_could_hide_the_image_is_refused() -> None:
    changed = Augmentation(crop_padding=4)(0.5 + 0.5 * pictures(), generator())
    assert (changed.flatten(1).max(dim=1).values > 0).all()
    with pytest.raises(ValueError, match=r"`crop_padding` is 5, but the images have 6 x 5 pixels: .*at most 4"):
        Augmentation(crop_padding=5)(pictures(), generator())


def test_wrong_normalisations_are_explained() -> None:
    with pytest.raises(ValueError, match="`mean` and `std` are .*Give as many finite numbers of either"):
        Normalisation(mean=(0.1, 0.2), std=(1.0,))
    with pytest.raises(ValueError, match="`images` have 3 channels, but `mean` has 2 entries"):
        Normalisation(mean=(0.1, 0.2), std=(1.0, 1.0))(pictures())
    with pytest.raises(ValueError, match="as many finite numbers"):
        Normalisation(mean=(float("nan"),), std=(1.0,))


def test_one_number_normalises_all_channels_but_three_no_grey_images() -> None:
    torch.testing.assert_close(
        Normalisation(mean=(0.5,), std=(0.25,))(pictures()), Normalisation(mean=(0.5,) * 3, std=(0.25,) * 3)(pictures())
    )
    with pytest.raises(ValueError, match="`images` have 1 channels, but `mean` has 3 entries.*one for all"):
        EpisodeSampler(
            StrokeCharacters(split="meta_val"),
            way=2,
            shot=1,
            num_queries=1,
            num_tasks=1,
            normalisation=Normalisation(mean=(0.5,) * 3, std=(1.0,) * 3),
        )


def test_a_seed_means_the_same_changes_for_ever() -> None:
    """The documented order of draws, by hand: mirror, two shifts, brightness."""
    images = torch.full((3, 1, 5, 5), 0.5)
    changed = Augmentation(flip=True, crop_padding=1, brightness=0.4)(images, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, 1, generator=generator)
    torch.randint(3, (2, 3, 1), generator=generator)
    factors = 1.0 + 0.4 * (2.0 * torch.rand(3, 1, 1, 1, generator=generator) - 1.0)
    torch.testing.assert_close(changed[:, 0, 2, 2], 0.5 * factors.flatten())
