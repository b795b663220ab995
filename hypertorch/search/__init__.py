"""Hyperparameter search."""

from hypertorch.search.range_test import NoSuggestionError, RangeFigures, lr_range_test, with_lr
from hypertorch.search.widening import widen

__all__ = [
    "NoSuggestionError",
    "RangeFigures",
    "lr_range_test",
    "widen",
    "with_lr",
]
