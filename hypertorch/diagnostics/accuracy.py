"""The error of an estimated hypergradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hypertorch import tree
from hypertorch.types import TensorDict, TensorMapping


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The difference of an estimate from the exact hypergradient.

    Attributes:
        error: `|estimate - exact| / |exact|`, norms over all entries of all hyperparameters.
        cosine: of the angle between the two; NaN if one is zero.
        errors: the relative error of each hyperparameter on its own.
    """

    error: float
    cosine: float
    errors: Mapping[str, float]

    @classmethod
    def of(cls, estimate: TensorMapping, exact: TensorMapping) -> Accuracy:
        """Returns the accuracy of an estimate.

        A relative error is 0 where both are zero, and infinite where only the exact one is.
        """
        estimate, exact = _in_double(estimate), _in_double(exact)
        sizes = float(tree.norm(estimate)) * float(tree.norm(exact))
        return cls(
            error=_relative_error(estimate, exact),
            cosine=float(tree.dot(estimate, exact)) / sizes if sizes else math.nan,
            errors={name: _relative_error({name: estimate[name]}, {name: exact[name]}) for name in exact},
        )


def _relative_error(estimate: TensorDict, exact: TensorDict) -> float:
    distance, size = float(tree.norm(tree.add(estimate, exact, alpha=-1.0))), float(tree.norm(exact))
    if size:
        return distance / size
    # An estimate of something that is zero has no small relative error.
    return math.inf if distance else 0.0


def _in_double(grads: TensorMapping) -> TensorDict:
    """Returns the values on the host in double precision: an error of 1e-7 must not drown in rounding."""
    # As pairs of reals: converted to float64, a complex number would lose its imaginary part.
    real = {name: torch.view_as_real(value) if value.is_complex() else value for name, value in grads.items()}
    return {name: value.detach().to("cpu", torch.float64) for name, value in real.items()}
