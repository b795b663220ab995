"""Features of images of CIFAR-100: outputs of a small network that was trained on other classes."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from time import process_time
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.common.commands.failures import ExpectedFailure
from hypertorch.errors import DatasetError
from hypertorch.fewshot import CIFARFS, ImageClasses
from hypertorch.fewshot.datasets.cache import cached_array

NewClasses: TypeAlias = Literal["meta_val", "meta_test"]
"""Classes of CIFAR-FS that the network is not trained on: 16 to choose settings by, or 20 to report."""

_NEW: tuple[NewClasses, ...] = ("meta_val", "meta_test")
_WIDTHS = (32, 64, 128, 256)
_BATCH = 128
_SHIFT = 4
_LR, _MOMENTUM, _WEIGHT_DECAY = 0.1, 0.9, 5e-4
_log = logging.getLogger(__name__)


def cifar100_features(
    root: str | None, part: NewClasses, *, num_epochs: int, folder: str | Path | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Returns features of the images of some classes, of shape `(classes, 600, features)`, and the names of these.

    The network is trained on the 64 classes that CIFAR-FS has for meta-training. It sees no image of the other 36.

    Cost: about a minute of one core for each epoch, unless the features are kept already.

    Args:
        root: the folder of CIFAR-100.
        part: which classes.
        num_epochs: of the training of the network.
        folder: where features are kept, in a safetensors file; None for the user's cache folder.

    Raises:
        ExpectedFailure: if the files are missing, or there is no such part.
    """
    if root is None:
        raise ExpectedFailure(
            "`experiment.root` is null, but photographs are those of CIFAR-100, which is read from a folder. Write "
            "experiment.root=FOLDER, with CIFAR-100's archive, or its images, in it."
        )
    if part not in _NEW:
        raise ExpectedFailure(f"`experiment.classes` is {part!r}, which names no classes. Use {' or '.join(_NEW)}.")
    try:
        seen = CIFARFS(root, split="meta_train")
        new = {name: CIFARFS(root, split=name) for name in _NEW}
    except DatasetError as error:
        raise ExpectedFailure(f"`experiment.root` is {root!r}, but CIFAR-100 cannot be read there. {error}") from error

    def make() -> np.ndarray:
        network = trained_network(seen, num_epochs)
        return torch.cat([features(network, classes.images) for classes in new.values()]).numpy()

    # All that features depend on.
    numbers = (_WIDTHS, _BATCH, _SHIFT, _LR, _MOMENTUM, _WEIGHT_DECAY, num_epochs)
    key = json.dumps([numbers, [_digest(classes) for classes in (seen, *new.values())]])
    found = torch.from_numpy(cached_array("cifar100-features", key, make, folder))
    own = dict(zip(_NEW, found.split([len(classes.images) for classes in new.values()]), strict=True))[part]
    return own.reshape(new[part].num_classes, -1, own.shape[1]), new[part].class_names


def trained_network(classes: ImageClasses, num_epochs: int) -> nn.Sequential:
    """Returns the blocks of a convolutional network that was trained to tell the classes.

    In every epoch each image is shifted by up to 4 pixels, and mirrored with probability 1/2.

    Args:
        classes: of images of three channels.
        num_epochs: passes over the images.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = nn.Sequential(*map(_block, (3, *_WIDTHS[:-1]), _WIDTHS))
        last = nn.Linear(_WIDTHS[-1], classes.num_classes)
    nn.utils.convert_conv2d_weight_memory_format(blocks, torch.channels_last)
    labels = torch.arange(classes.num_classes).repeat_interleave(torch.tensor(classes.counts))
    params = [*blocks.parameters(), *last.parameters()]
    optimizer = torch.optim.SGD(params, lr=_LR, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY, nesterov=True)
    batches = -(-len(labels) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=num_epochs * batches)
    for epoch in range(num_epochs):
        total = 0.0
        for rows in torch.randperm(len(labels), generator=generator).split(_BATCH):
            outputs = last(blocks(_scaled(_changed(classes.images[rows], generator))).mean(dim=(2, 3)))
            loss = F.cross_entropy(outputs, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        _log.info(
            f"network of the features: epoch {epoch + 1} of {num_epochs}, training loss {total / len(labels):.3f}, "
            f"{process_time():.0f} CPU seconds"
        )
    return blocks.eval()


@torch.no_grad()
def features(blocks: nn.Sequential, images: Tensor) -> Tensor:
    """Returns the means over the image of the last two blocks' outputs, shape `(images, features)`.

    Args:
        blocks: a trained network.
        images: bytes, shape `(images, 3, height, width)`.
    """
    parts = []
    for batch in images.split(500):
        before = blocks[:-1](_scaled(batch))
        parts.append(torch.cat([before.mean(dim=(2, 3)), blocks[-1](before).mean(dim=(2, 3))], dim=1))
    return torch.cat(parts)


def _block(channels: int, width: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))


def _changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images that are shifted and mirrored, each by its own draw."""
    side = images.shape[-1]
    padded = F.pad(images, (_SHIFT,) * 4)
    down, right = torch.randint(2 * _SHIFT + 1, (2, len(images), 1), generator=generator)
    is_mirrored = torch.randint(2, (len(images), 1), generator=generator).bool()
    rows = columns = torch.arange(side)
    rows, columns = rows + down, torch.where(is_mirrored, side - 1 - columns, columns) + right
    image = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _scaled(images: Tensor) -> Tensor:
    """Returns bytes as numbers from -1 to 1, in the order that convolutions are fastest in."""
    return (images.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def _digest(classes: ImageClasses) -> str:
    return hashlib.sha256(classes.images.numpy().data).hexdigest()
