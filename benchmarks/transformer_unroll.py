"""A Transformer in the inner loop: deep graphs, large activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import variants
from benchmarks.contestant import Contestant
from benchmarks.data import Source
from benchmarks.job import Job, Predict, Stated
from benchmarks.work import Target, Work
from hypertorch.types import Batch, TensorDict

_VOCABULARY = 64


@dataclass(frozen=True, kw_only=True)
class TransformerUnroll(Work):
    """A causal language model with a weight for every training sequence.

    Args:
        num_steps: inner steps.
        num_layers: blocks of attention and MLP.
        width: numbers per token.
        num_heads: heads of the attention.
        num_tokens: tokens of a sequence.
        num_sequences: training sequences, all of them in every step, and as many held-out ones.
    """

    num_steps: int = 32
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_tokens: int = 64
    num_sequences: int = 16

    @property
    def title(self) -> str:
        """What is computed."""
        return (
            f"Transformer ({self.num_layers} layers, width {self.width}, {self.num_tokens} tokens, "
            f"{self.num_sequences} sequences), {self.num_steps} steps, sequence weights"
        )

    def job(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> Job:
        """Returns the job with its data."""
        source = Source.seeded(seed, device, dtype)
        tokens = source.labels(_VOCABULARY, self.num_sequences, self.num_tokens + 1)
        held_out = source.labels(_VOCABULARY, self.num_sequences, self.num_tokens + 1)

        def each_loss(predict: Predict, batch: Tensor) -> Tensor:
            logits = predict(batch[:, :-1])
            return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(dim=1)

        def inner_loss(predict: Predict, hparams: TensorDict, batch: Batch) -> Tensor:
            return (hparams["weight"].sigmoid() * each_loss(predict, batch)).mean()

        def outer_loss(predict: Predict, _: TensorDict, batch: Batch) -> Tensor:
            return each_loss(predict, batch).mean()

        return Job(
            network=source.network(Transformer(self.num_layers, self.width, self.num_heads, self.num_tokens)),
            hparams={"weight": source.normal(self.num_sequences)},
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            inner_batch=lambda _: tokens,
            outer_batch=held_out,
            num_steps=self.num_steps,
            lr=0.1,
            stated=Stated(
                network="transformer",
                network_settings={"num_layers": self.num_layers, "num_heads": self.num_heads},
                losses="weighted_sequences",
                data={"tokens": tokens, "held_out": held_out},
            ),
        )

    def contestants(self) -> Mapping[str, Contestant]:
        """Returns who takes part."""
        return variants.chosen(
            *variants.PEERS,
            variants.EAGER,
            variants.COMPILED,
            variants.SQRT,
            variants.STEP_WISE,
            variants.STEP_WISE_COMPILED,
            variants.MIXED,
            variants.MIXED_COMPILED,
            variants.MIXED_SQRT_COMPILED,
            *variants.IN_JAX,
            variants.PLAIN,
        )

    def targets(self) -> tuple[Target, ...]:
        """Returns the ratios to be reached."""
        return (
            Target(contestant=variants.MIXED_COMPILED, quantity="time", against="peers", at_most=1.1),
            Target(contestant=variants.MIXED_COMPILED, quantity="memory", against="peers", at_most=1 / 10),
            *(
                Target(contestant=variants.MIXED_COMPILED, quantity="time", against=name, at_most=0.8)
                for name in variants.IN_JAX
            ),
        )

    def tiny(self) -> TransformerUnroll:
        """Returns the same work in sizes that take no time."""
        return replace(self, num_steps=2, num_layers=1, width=4, num_heads=2, num_tokens=3, num_sequences=2)


class Transformer(nn.Module):
    """A causal language model whose attention is written out, since PyTorch's fused one has no second derivative.

    Shapes: tokens `(sequences, tokens)` to logits `(sequences, tokens, vocabulary)`.

    Args:
        num_layers: blocks.
        width: numbers per token.
        num_heads: heads; they divide the width.
        num_tokens: the longest sequence.
    """

    def __init__(self, num_layers: int, width: int, num_heads: int, num_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.places = nn.Parameter(torch.zeros(num_tokens, width))
        self.blocks = nn.Sequential(*(_Block(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, _VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of the next token at every place."""
        return self.readout(self.norm(self.blocks(self.tokens(tokens) + self.places)))


class _Block(nn.Module):
    """Attention and MLP, each after a layer norm and added to what it came from."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.before_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.after_attention = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.after_attention(self._attended(self.before_attention(tokens)))
        return tokens + self.mlp(self.before_mlp(tokens))

    def _attended(self, tokens: Tensor) -> Tensor:
        split = self.queries_keys_values(tokens).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = (part.transpose(-3, -2) for part in split.unbind(-3))
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        shares = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        return (shares @ values).transpose(-3, -2).flatten(-2)
