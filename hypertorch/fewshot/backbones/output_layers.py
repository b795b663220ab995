"""What follows the features of a backbone: their norm, and a classifier."""

from __future__ import annotations

from torch import nn

from hypertorch.nn.batch_norm import Statistics
from hypertorch.nn.feature_norm import FeatureNorm


def output_layers(
    num_features: int, *, way: int | None, feature_length: float | None, statistics: Statistics
) -> tuple[nn.Module, nn.Module]:
    """Returns the norm of the features and the classifier on them; the identity for one that is not asked for.

    Args:
        num_features: features per example.
        way: outputs of the classifier; None for no classifier.
        feature_length: root mean square length that features are scaled to; None for no norm.
        statistics: the rule of the norm.
    """
    norm = (
        nn.Identity()
        if feature_length is None
        else FeatureNorm(num_features, length=feature_length, statistics=statistics)
    )
    return norm, nn.Identity() if way is None else nn.Linear(num_features, way)
