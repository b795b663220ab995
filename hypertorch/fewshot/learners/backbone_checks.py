"""What a representation must be for a head learner."""

from __future__ import annotations

from torch import nn

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def first_parameter(backbone: nn.Module) -> nn.Parameter:
    """Returns a parameter, whose dtype and device are those of what is built for the backbone.

    Raises:
        ValueError: if there is none.
    """
    for parameter in backbone.parameters():
        return parameter
    raise ValueError(
        f"`backbone` is a {type(backbone).__name__} without parameters: the representation is what the outer loop "
        "learns, and there is nothing to learn. Add a layer that has some."
    )


def feature_count(backbone: nn.Module) -> int:
    """Returns how many features a backbone says it has.

    Raises:
        ValueError: if it does not say.
    """
    count = getattr(backbone, "num_features", None)
    if isinstance(count, int):
        return count
    raise ValueError(
        f"`backbone` is a {type(backbone).__name__} whose `num_features` is {count!r}: the first head is an outer "
        "variable, so its size must be known before any image is seen. Set it to the number of features per image: "
        "`backbone.num_features = 64`."
    )


def refuse_dropout(backbone: nn.Module) -> None:
    """Raises `ValueError` if a backbone drops features at random.

    Support and query pass through a representation together, where nothing tells training from judging: dropout would
    stay on when a trained learner predicts.
    """
    random = [
        name or type(module).__name__
        for name, module in backbone.named_modules()
        if (isinstance(module, _DROPOUTS) and module.p > 0.0)
        or (isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0.0)
    ]
    if random:
        raise ValueError(
            f"`backbone` has dropout in {random}: support and query pass through the representation together, so it "
            "would stay on when the trained learner predicts. Set its probability to 0, and regularise by "
            "augmentation or weight decay of the outer optimizer instead. MAML, which adapts all weights, can have it."
        )
