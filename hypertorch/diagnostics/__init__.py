"""Diagnostics of hypergradients: checks, comparisons of backends, and the spectrum of the inner map."""

from hypertorch.diagnostics.accuracy import Accuracy
from hypertorch.diagnostics.check import DirectionalCheck, HypergradientCheck, check_hypergradient
from hypertorch.diagnostics.compare import BackendComparison, BackendFigures, compare_backends
from hypertorch.diagnostics.geometric_fit import GeometricFit
from hypertorch.diagnostics.horizon import HorizonBias, HorizonPoint, horizon_bias
from hypertorch.diagnostics.metasmoothness import Metasmoothness, metasmoothness
from hypertorch.diagnostics.spectral import SpectralRadius, spectral_radius

__all__ = [
    "Accuracy",
    "BackendComparison",
    "BackendFigures",
    "DirectionalCheck",
    "GeometricFit",
    "HorizonBias",
    "HorizonPoint",
    "HypergradientCheck",
    "Metasmoothness",
    "SpectralRadius",
    "check_hypergradient",
    "compare_backends",
    "horizon_bias",
    "metasmoothness",
    "spectral_radius",
]
