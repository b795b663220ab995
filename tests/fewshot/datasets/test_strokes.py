import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypertorch.fewshot.datasets.stroke_drawing import draw_class
from hypertorch.fewshot.datasets.strokes import StrokeCharacters
from hypertorch.fewshot.sampler import EpisodeSampler

CHECKOUT = Path(__file__).resolve().parents[3]


def characters(tmp_path, **changes):
    return StrokeCharacters(**({"split": "meta_train", "num_classes": 12, "cache_dir": tmp_path} | changes))


def test_default_sizes(tmp_path):
    sizes = {
        split: characters(tmp_path, split=split, num_classes=None, drawings=1).num_classes
        for split in ("meta_train", "meta_val", "meta_test")
    }
    assert sizes == {"meta_train": 400, "meta_val": 80, "meta_test": 120}


def test_shape_and_names(tmp_path):
    dataset = characters(tmp_path, drawings=3, image_size=20)
    assert dataset.images.shape == (36, 1, 20, 20)
    assert dataset.images.dtype == torch.uint8
    assert dataset.counts == (3,) * 12
    assert dataset.class_names[:2] == ("meta_train/0000", "meta_train/0001")


def test_the_pixels_of_a_seed_never_change(tmp_path):
    images = characters(tmp_path, num_classes=40, seed=3).images
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == GOLDEN


GOLDEN = "1214f9367e4466b089b2a3ea7e3a58ccb9a6afee8c4c4070780e9a0d540328f7"


def test_another_process_draws_the_same(tmp_path):
    program = (
        "import hashlib, sys\n"
        "from hypertorch.fewshot.datasets.strokes import StrokeCharacters\n"
        "data = StrokeCharacters(split='meta_val', num_classes=5, cache_dir=sys.argv[1])\n"
        "print(hashlib.sha256(data.images.numpy().tobytes()).hexdigest())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "other")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT).stdout.strip()
    here = characters(tmp_path, split="meta_val", num_classes=5).images
    assert printed == hashlib.sha256(here.numpy().tobytes()).hexdigest()


def test_the_cache_gives_the_same_and_is_used(tmp_path, monkeypatch):
    first = characters(tmp_path)
    monkeypatch.setattr("hypertorch.fewshot.datasets.strokes.draw_class", None)
    assert torch.equal(characters(tmp_path).images, first.images)


def test_every_setting_is_part_of_the_cache_key(tmp_path):
    variants = [
        {},
        {"seed": 1},
        {"split": "meta_val"},
        {"num_classes": 11},
        {"drawings": 19},
        {"image_size": 27},
    ]
    drawn = {
        hashlib.sha256(characters(tmp_path, **variant).images.numpy().tobytes()).hexdigest() for variant in variants
    }
    assert len(drawn) == len(variants) == len(list(tmp_path.iterdir()))


def test_the_first_classes_and_drawings_stay_when_there_are_more(tmp_path):
    few = characters(tmp_path, drawings=4).images.reshape(12, 4, -1)
    many = characters(tmp_path, num_classes=15, drawings=6).images.reshape(15, 6, -1)
    assert torch.equal(many[:12, :4], few)


def test_splits_have_no_drawing_in_common(tmp_path):
    drawings = [
        drawing.numpy().tobytes()
        for split in ("meta_train", "meta_val", "meta_test")
        for drawing in characters(tmp_path, split=split).images
    ]
    assert len(set(drawings)) == len(drawings) == 3 * 12 * 20


def test_ink_is_white_and_the_paper_is_mostly_empty(tmp_path):
    images = characters(tmp_path, num_classes=60).images.reshape(1200, -1).float() / 255
    ink = images.mean(dim=1)
    assert (images.amax(dim=1) > 0.8).all()
    assert 0.01 < ink.min() < ink.max() < 0.5
    assert ((images > 0.05) & (images < 0.95)).float().mean() > 0.02  # antialiased


def test_bigger_images_show_the_same_drawings():
    small = torch.from_numpy(draw_class(4, 28, 1, 2)).float()
    big = torch.from_numpy(draw_class(4, 112, 1, 2)).float()
    shrunk = torch.nn.functional.avg_pool2d(big, 4)
    assert (shrunk - small).abs().mean() < 6  # of 255


def test_difficulty_is_between_chance_and_trivial(tmp_path):
    dataset = characters(tmp_path, num_classes=120)
    episode = EpisodeSampler(dataset, way=5, shot=1, num_queries=5, num_tasks=300).at(0)
    support, query = (
        torch.nn.functional.normalize(examples.inputs.flatten(2), dim=-1)
        for examples in (episode.support, episode.query)
    )
    nearest = (query @ support.transpose(1, 2)).argmax(dim=-1)
    assert 0.45 < (nearest == episode.query.targets).float().mean() < 0.75


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"split": "train"}, ValueError, r"`split` is 'train': there is no such split. Use one of 'meta_train'"),
        ({"num_classes": 0}, ValueError, r"`num_classes` must be at least 1, got 0: .*Leave it out"),
        ({"drawings": 0}, ValueError, r"`drawings` must be at least 1, got 0: .*Use for instance 20"),
        ({"image_size": 7}, ValueError, r"`image_size` must be at least 8, got 7: .*Use for instance"),
        ({"seed": "0"}, TypeError, r"`seed` is '0', a str: "),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        characters(tmp_path, **changes)
