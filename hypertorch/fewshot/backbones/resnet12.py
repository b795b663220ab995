"""The residual network of the few-shot literature."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import is_count
from hypertorch.fewshot.backbones.output_layers import output_layers
from hypertorch.nn.batch_norm import BatchNorm, Statistics


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, each halving the image; then averaged, maybe classified.

    A block is `pool(leaky(conv-norm-leaky-conv-norm-leaky-conv-norm(x) + norm(conv1x1(x))))` with a 2x2 max-pool and
    leaky ReLU of slope 0.1. No dropout or DropBlock.

    Shapes: input `(batch, in_channels, height, width)`, at least 16 pixels a side; output `(batch, num_features)`, or
    `(batch, way)` with a classifier.

    Args:
        way: number of outputs of a linear classifier at the end; None for features.
        channels: channels of the four blocks; (64, 128, 256, 512) and (64, 160, 320, 640) are usual.
        in_channels: channels of the image.
        statistics: the rule of `BatchNorm`, and of `FeatureNorm`.
        feature_length: centre the features and scale them to this root mean square length (`FeatureNorm`), before the
            classifier if there is one; None leaves them as they are.

    Attributes:
        num_features: features per image before the classifier.

    Raises:
        ValueError: if a number is out of range, or there are not four blocks; and, from a call, if images have another
            number of channels or are too small.

    References:
        Oreshkin, Rodriguez and Lacoste (2018), TADAM, section 2.1; Lee et al. (2019), MetaOptNet, section 4.1.
    """

    @typed("channels", "feature_length")
    def __init__(
        self,
        *,
        way: int | None = None,
        channels: Sequence[int] = (64, 128, 256, 512),
        in_channels: int = 3,
        statistics: Statistics = "episode",
        feature_length: float | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        if len(channels) != 4 or not all(map(is_count, [*widths, 1 if way is None else way])):
            raise ValueError(
                f"`channels`, `in_channels` and `way` are {tuple(channels)}, {in_channels} and {way}: a ResNet-12 has "
                "four blocks of at least one channel. Use for instance (64, 128, 256, 512)."
            )
        self.in_channels = in_channels
        self.num_features = channels[-1]
        self.blocks = nn.Sequential(*(_Block(first, last, statistics) for first, last in pairwise(widths)))
        self.feature_norm, self.classifier = output_layers(
            self.num_features, way=way, feature_length=feature_length, statistics=statistics
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns features, or logits if there is a classifier."""
        # Four halvings leave one pixel of 16, and of fewer none.
        if images.dim() != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < 16:
            raise ValueError(
                f"`images` have shape {tuple(images.shape)}, but this ResNet12 was built for (batch, "
                f"{self.in_channels}, height, width) of at least 16 x 16. Pass `in_channels` of your images to it, or "
                "scale the images."
            )
        # Averaged over places, so the number of features does not depend on the size of the images.
        return self.classifier(self.feature_norm(self.blocks(images).mean(dim=(2, 3))))


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, statistics: Statistics) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_channels, channels, channels):
            # Batch norm subtracts any bias of the convolution again.
            layers += [
                nn.Conv2d(width, channels, kernel_size=3, padding=1, bias=False),
                BatchNorm(channels, statistics=statistics),
                nn.LeakyReLU(0.1),
            ]
        # The last activation waits for the skip: it is applied to the sum.
        self.residual = nn.Sequential(*layers[:-1])
        self.skip = nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=1, bias=False), BatchNorm(channels, statistics=statistics)
        )
        self.out = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.residual(images) + self.skip(images))
