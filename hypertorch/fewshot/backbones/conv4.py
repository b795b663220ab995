"""The four-block convolutional network of the few-shot literature."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, TypeAlias

from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import is_count
from hypertorch.fewshot.backbones.output_layers import output_layers
from hypertorch.nn.batch_norm import BatchNorm, Statistics

Downsample: TypeAlias = Literal["max_pool", "stride"]


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm and ReLU, each halving the image; then flattened, maybe classified.

    Halving is by a 2x2 max-pool after the block (Vinyals et al.; MAML on mini-ImageNet), or by a stride of 2 in the
    convolution (MAML and hyper-representation on Omniglot), which is about four times cheaper. A 28x28 image ends as
    1x1 with max-pool (which rounds down) and 2x2 with stride (which rounds up).

    Shapes: input `(batch, in_channels, image_size, image_size)`; output `(batch, num_features)`, or `(batch, way)`
    with a classifier.

    Args:
        way: number of outputs of a linear classifier at the end; None for features.
        hidden: channels of every block.
        downsample: "max_pool" or "stride".
        in_channels: channels of the image.
        image_size: height and width of the image (unit: pixels).
        statistics: the rule of `BatchNorm`, and of `FeatureNorm`.
        feature_length: centre the features and scale them to this root mean square length (`FeatureNorm`), before the
            classifier if there is one; None leaves them as they are.

    Attributes:
        num_features: features per image before the classifier.
        item_shape: channels, height and width of an image.

    Raises:
        ValueError: if `downsample` is unknown, a number is out of range, or the image is too small to be halved four
            times; and, from a call, if the images have another shape.

    References:
        Vinyals et al. (2016), Matching networks, section 4.1; Finn, Abbeel and Levine (2017), MAML, section 5.2.
    """

    @typed("feature_length")
    def __init__(
        self,
        *,
        way: int | None = None,
        # Vinyals et al. take 64; MAML takes 32 on mini-ImageNet, against overfitting.
        hidden: int = 64,
        downsample: Downsample = "max_pool",
        in_channels: int = 1,
        image_size: int = 28,
        statistics: Statistics = "episode",
        feature_length: float | None = None,
    ) -> None:
        super().__init__()
        if downsample not in ("max_pool", "stride"):
            raise ValueError(
                f"`downsample` is {downsample!r}, which names no way to halve an image. Use 'max_pool' or 'stride'."
            )
        sizes = {"hidden": hidden, "in_channels": in_channels, "image_size": image_size}
        for name, value in {**sizes, "way": 1 if way is None else way}.items():
            if not is_count(value):
                raise ValueError(f"`{name}` is {value!r}: a network has at least one. Use a positive whole number.")
        self.item_shape = (in_channels, image_size, image_size)
        size = image_size
        for _ in range(4):
            # Max-pool drops an odd last row and column; a stride of 2 with padding 1 keeps them, and rounds up.
            size = size // 2 if downsample == "max_pool" else -(-size // 2)
        if size < 1:
            raise ValueError(
                f"`image_size` is {image_size}, which cannot be halved four times by max-pool. Use at least 16 pixels, "
                "or `downsample='stride'`."
            )
        # Known before any image is seen: a head that is an outer variable (ANIL) is made from it.
        self.num_features = hidden * size * size
        channels = [in_channels, hidden, hidden, hidden, hidden]
        self.blocks = nn.Sequential(
            *(_block(channels[i], channels[i + 1], downsample, statistics) for i in range(4)), nn.Flatten()
        )
        self.feature_norm, self.classifier = output_layers(
            self.num_features, way=way, feature_length=feature_length, statistics=statistics
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns features, or logits if there is a classifier."""
        if images.dim() != 4 or images.shape[1:] != self.item_shape:
            raise ValueError(
                f"`images` have shape {tuple(images.shape)}, but this Conv4 was built for (batch, "
                f"{', '.join(map(str, self.item_shape))}). Pass `in_channels` and `image_size` of your images to it, "
                "or scale the images."
            )
        return self.classifier(self.feature_norm(self.blocks(images)))


def _block(in_channels: int, out_channels: int, downsample: Downsample, statistics: Statistics) -> nn.Sequential:
    stride = 2 if downsample == "stride" else 1
    # The names are those of the outer variables: weights of earlier runs are found by them.
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        # Batch norm subtracts any bias of the convolution again.
        conv=nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        norm=BatchNorm(out_channels, statistics=statistics),
        relu=nn.ReLU(),
    )
    if downsample == "max_pool":
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)
