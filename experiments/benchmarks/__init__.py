"""Works on which hypertorch is measured beside other libraries, and the measuring: time, memory, agreement, growth."""

from experiments.benchmarks.conv_fewshot import ConvHyperRepresentation, ConvMAML
from experiments.benchmarks.forward_cost import ForwardCost
from experiments.benchmarks.growth import ParameterGrowth
from experiments.benchmarks.large_unroll import LargeUnroll
from experiments.benchmarks.reversible_unroll import ReversibleUnroll
from experiments.benchmarks.sinusoid_maml import SinusoidMAML
from experiments.benchmarks.small_unroll import SmallUnroll
from experiments.benchmarks.transformer_unroll import TransformerUnroll

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
