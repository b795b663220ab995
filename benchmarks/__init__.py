"""Works on which hypertorch is measured beside other libraries, and the measuring: time, memory, agreement, growth."""

from benchmarks.conv_fewshot import ConvHyperRepresentation, ConvMAML
from benchmarks.forward_cost import ForwardCost
from benchmarks.growth import ParameterGrowth
from benchmarks.large_unroll import LargeUnroll
from benchmarks.reversible_unroll import ReversibleUnroll
from benchmarks.sinusoid_maml import SinusoidMAML
from benchmarks.small_unroll import SmallUnroll
from benchmarks.transformer_unroll import TransformerUnroll

__all__ = [
    "ConvHyperRepresentation",
    "ConvMAML",
    "ForwardCost",
    "LargeUnroll",
    "ParameterGrowth",
    "ReversibleUnroll",
    "SinusoidMAML",
    "SmallUnroll",
    "TransformerUnroll",
]
