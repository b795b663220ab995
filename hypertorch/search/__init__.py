"""Hyperparameter search."""

from hypertorch.search.range_test import NoSuggestionError, RangeFigures, lr_range_test, with_lr

__all__ = [
    "NoSuggestionError",
    "RangeFigures",
    "lr_range_test",
    "with_lr",
]
