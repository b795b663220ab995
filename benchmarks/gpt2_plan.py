"""How reverse mode would fit the inner training of a language model of the size of GPT-2 into memory.

python -m benchmarks.gpt2_plan
python -m benchmarks.gpt2_plan --steps 5000 --rows 4 --budget 80GB
python -m benchmarks.gpt2_plan --spill

Nothing is allocated: the plan is made on fake tensors, which have shapes and no memory.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import hypertorch as ht
from benchmarks.command_words import count, size
from hypertorch.types import Batch, TensorDict


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a language model; the defaults are those of the smallest GPT-2, of 124 million parameters.

    Args:
        layers: transformer blocks.
        width: features of a token.
        heads: attention heads in a block.
        vocabulary: tokens there are.
        length: tokens in a row.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    length: int = 1024


class Block(nn.Module):
    """A transformer block with causal attention, normalised before each part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.combine = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns features of shape `(rows, length, width)`."""
        rows, length, width = x.shape
        projected = self.project(self.before_attention(x)).reshape(rows, length, 3, self.heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        # Written out: PyTorch's fused attention has no second derivative.
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        x = x + self.combine((weights @ value).transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp(self.before_mlp(x))


class LanguageModel(nn.Module):
    """A model of the next token, with one matrix for tokens and outputs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(shape.vocabulary, shape.width), nn.Embedding(shape.length, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits of shape `(rows, length, vocabulary)`."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.norm(self.blocks(x)) @ self.tokens.weight.T


class Training(ht.InnerProblem):
    """The language model, with a weight for each row of tokens."""

    def __init__(self, module: ht.FunctionalModule, tokens: Tensor) -> None:
        self.module, self.tokens = module, tokens

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the module's own weights."""
        return self.module.init_params()

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the weighted cross-entropy of the next tokens."""
        return (hparams["weights"].sigmoid() * losses_of_rows(self.module, params, self.tokens)).mean()


class Validation(ht.OuterProblem):
    """The same loss without weights."""

    def __init__(self, module: ht.FunctionalModule, tokens: Tensor) -> None:
        self.module, self.tokens = module, tokens

    def init_hparams(self) -> TensorDict:
        """Returns a weight for each row."""
        return {"weights": torch.zeros(len(self.tokens))}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy."""
        return losses_of_rows(self.module, params, self.tokens).mean()


def losses_of_rows(module: ht.FunctionalModule, params: TensorDict, tokens: Tensor) -> Tensor:
    """Returns the mean loss of the next token of every row, shape `(rows,)`."""
    logits = module(params, tokens[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)


def language_problem(shape: Shape, *, num_steps: int, rows: int) -> ht.BilevelProblem:
    """Returns weights of rows of tokens, by AdamW on a language model; data and weights are random.

    Args:
        shape: of the model.
        num_steps: inner steps.
        rows: rows of tokens in the data of every step.
    """
    module = ht.FunctionalModule(LanguageModel(shape))
    tokens = torch.randint(shape.vocabulary, (rows, shape.length + 1))
    dynamics = ht.dynamics.AdamW(lr=3e-4)
    return ht.BilevelProblem(
        Training(module, tokens), Validation(module, tokens), dynamics=dynamics, num_steps=num_steps
    )


def main() -> None:
    """Prints the plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=count, default=1000, help="inner steps")
    parser.add_argument("--rows", type=count, default=8, help="rows of tokens in a batch")
    parser.add_argument("--budget", type=size, default="141GB", help="bytes, such as 80GB")
    parser.add_argument("--spill", action="store_true", help="with kept states in a file, on disk or on the host")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    with FakeTensorMode():
        problem = language_problem(Shape(), num_steps=arguments.steps, rows=arguments.rows)
        hparams = problem.init_hparams()
        num_params = sum(value.numel() for value in problem.inner.init_params(hparams).values())
        plan = ht.hypergradients.plan_memory(problem, hparams, arguments.budget, spill=arguments.spill)
    console.print(f"{num_params:,} parameters, {arguments.steps} steps of AdamW, {arguments.rows} rows of 1024 tokens")
    console.print(plan.explain())


if __name__ == "__main__":
    main()
