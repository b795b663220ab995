"""Shapes, rules of batch norm and refusals of the few-shot networks."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hypertorch.fewshot.backbones import MLP, BatchNorm, Conv4


@pytest.mark.parametrize(
    ("downsample", "image_size", "num_features"),
    [("max_pool", 28, 64), ("stride", 28, 256), ("max_pool", 84, 1600), ("stride", 84, 2304), ("stride", 1, 64)],
)
def test_conv4_features_and_logits(downsample: str, image_size: int, num_features: int) -> None:
    images = torch.rand(6, 1, image_size, image_size)
    features = Conv4(downsample=downsample, image_size=image_size)  # type: ignore[arg-type]
    assert features.num_features == num_features
    assert features(images).shape == (6, num_features)
    assert Conv4(way=5, downsample=downsample, image_size=image_size)(images).shape == (6, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("downsample", ["max_pool", "stride"])
@pytest.mark.parametrize(
    ("hidden", "in_channels", "image_size", "way", "count"),
    [
        # Four convolutions without bias, scale and shift of four norms, and a classifier on what is left of the image:
        # 28 pixels leave 1 x 1 by max-pool and 2 x 2 by stride, 84 leave 5 x 5 and 6 x 6, 32 leave 2 x 2 by either.
        (64, 1, 28, None, {"max_pool": 111_680, "stride": 111_680}),
        (64, 1, 28, 5, {"max_pool": 112_005, "stride": 112_965}),
        (64, 1, 28, 20, {"max_pool": 112_980, "stride": 116_820}),
        (32, 3, 84, None, {"max_pool": 28_768, "stride": 28_768}),
        (32, 3, 84, 5, {"max_pool": 32_773, "stride": 34_533}),
        (64, 3, 32, 5, {"max_pool": 114_117, "stride": 114_117}),
    ],
)
def test_conv4_has_the_number_of_weights_counted_by_hand(
    downsample: str, hidden: int, in_channels: int, image_size: int, way: int | None, count: dict[str, int]
) -> None:
    network = Conv4(way=way, hidden=hidden, in_channels=in_channels, image_size=image_size, downsample=downsample)  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in network.parameters()) == count[downsample]
    sides = {"max_pool": {28: 1, 84: 5, 32: 2}, "stride": {28: 2, 84: 6, 32: 2}}
    classifier = 0 if way is None else (hidden * sides[downsample][image_size] ** 2 + 1) * way
    assert count[downsample] == 9 * hidden * (in_channels + 3 * hidden) + 8 * hidden + classifier


@pytest.mark.parametrize("downsample", ["max_pool", "stride"])
def test_conv4_is_convolution_norm_relu_and_pooling_four_times(downsample: Literal["max_pool", "stride"]) -> None:
    network = Conv4(hidden=4, image_size=16, downsample=downsample).double()
    images = torch.rand(6, 1, 16, 16, dtype=torch.float64)
    expected = images
    for kernel in (value for value in network.parameters() if value.dim() == 4):
        expected = F.conv2d(expected, kernel, stride=2 if downsample == "stride" else 1, padding=1)
        expected = F.batch_norm(expected, None, None, training=True).relu()
        expected = F.max_pool2d(expected, 2) if downsample == "max_pool" else expected
    torch.testing.assert_close(network(images), expected.flatten(1), rtol=1e-10, atol=1e-12)


def test_conv4_refusals() -> None:
    with pytest.raises(ValueError, match="`downsample` is 'pool'.*Use 'max_pool' or 'stride'"):
        Conv4(downsample="pool")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`image_size` is 15, which cannot be halved four times"):
        Conv4(image_size=15)
    with pytest.raises(ValueError, match="`statistics` is 'batch'.*'episode'.*'running'"):
        Conv4(statistics="batch")  # type: ignore[arg-type]


def reference_norm() -> tuple[BatchNorm, nn.BatchNorm2d, torch.Tensor]:
    torch.manual_seed(0)
    ours, theirs = BatchNorm(3).double(), nn.BatchNorm2d(3, track_running_stats=False).double()
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(torch.randn(3))
            other.copy_(mine)
    return ours, theirs, torch.randn(4, 3, 5, 5, dtype=torch.float64)


def test_episode_statistics_equal_batch_norm_in_either_mode() -> None:
    ours, theirs, images = reference_norm()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(images), theirs(images), rtol=1e-12, atol=1e-12)
    assert not list(ours.buffers())


def test_running_statistics_normalise_by_the_stored_ones_in_evaluation() -> None:
    norm = BatchNorm(3, statistics="running", momentum=1.0).double()
    support, query = torch.randn(8, 3, 4, 4, dtype=torch.float64) * 3 + 1, torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        norm(support)
        alone = norm.eval()(query[:1])
        together = norm(query)[:1]
    torch.testing.assert_close(alone, together)  # a query does not depend on its companions
    mean, var = support.mean((0, 2, 3)), support.var((0, 2, 3), correction=0)
    expected = (query[:1] - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-10)


def test_running_momentum_is_the_weight_of_the_new_call() -> None:
    norm = BatchNorm(2, statistics="running", momentum=0.25).double()
    images = torch.full((1, 2, 1, 1), 8.0, dtype=torch.float64)
    with torch.no_grad():
        norm(images)
    torch.testing.assert_close(norm.running_mean, torch.full((2,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(norm.running_var, torch.full((2,), 0.75, dtype=torch.float64))


def test_mlp_shapes_and_refusals() -> None:
    assert MLP()(torch.rand(10, 1)).shape == (10, 1)
    assert MLP(in_features=784, hidden=(8,), out_features=None)(torch.rand(2, 1, 28, 28)).shape == (2, 8)
    assert MLP(in_features=3, hidden=(), out_features=2)(torch.rand(2, 3)).shape == (2, 2)
    with pytest.raises(ValueError, match="a layer has at least one unit"):
        MLP(hidden=(0,))
    with pytest.raises(ValueError, match="`hidden` is empty and `out_features` is None"):
        MLP(hidden=(), out_features=None)
