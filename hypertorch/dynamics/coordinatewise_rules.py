"""Networks that serve as learnt update rules: they see one coordinate at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import is_count
from hypertorch.dynamics.learned_update import UpdateRule
from hypertorch.types import TensorDict


class CoordinatewiseLSTM(UpdateRule):
    """An LSTM on the preprocessed gradient of every coordinate, with a linear map from its last layer to the update.

    Each layer, with `x` the features or the hidden state of the layer below:

        i, f, o = sigmoid(W_i [x, h] + b_i), sigmoid(W_f [x, h] + b_f), sigmoid(W_o [x, h] + b_o)
        c = f * c + i * tanh(W_c [x, h] + b_c)
        h = o * tanh(c)

    The bias of the forget gate starts at 1 higher, so that the cell remembers from the beginning.

    Cost: per coordinate and step, a matrix product of `4 hidden (features + hidden)` a layer; state of `2 hidden` per
    coordinate and layer.

    Args:
        hidden: size of the hidden state of each layer.
        layers: number of layers.
        preprocess: `p` of `log_and_sign`; None feeds the gradient as it is.

    Raises:
        ValueError: if a number is out of range.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, section 2.1 and
        appendix A; Hochreiter and Schmidhuber (1997) (the cell); Gers, Schmidhuber and Cummins (2000) (the forget
        gate).
    """

    @typed("preprocess")
    def __init__(self, *, hidden: int = 20, layers: int = 2, preprocess: float | None = 10.0) -> None:
        super().__init__()
        _check_size("CoordinatewiseLSTM", "hidden", hidden)
        _check_size("CoordinatewiseLSTM", "layers", layers)
        _check_preprocess("CoordinatewiseLSTM", preprocess)
        self.hidden = hidden
        self.preprocess = preprocess
        # The first layer sees the features, each other one the hidden state of the layer below.
        inputs = [_num_features(preprocess), *[hidden] * (layers - 1)]
        self.gates = nn.ModuleList(_gates(size, hidden) for size in inputs)
        self.output = nn.Linear(hidden, 1)

    def initial_state(self, like: Tensor) -> TensorDict:
        """Returns zeros, `hidden{layer}` and `cell{layer}`, each of shape `(*like.shape, hidden)`."""
        return {
            f"{name}{layer}": like.new_zeros(*like.shape, self.hidden)
            for layer in range(len(self.gates))
            for name in ("hidden", "cell")
        }

    def forward(self, gradient: Tensor, state: TensorDict) -> tuple[Tensor, TensorDict]:
        """Returns the update and the hidden states and cells of all layers."""
        signal = _features(gradient, self.preprocess)
        new_state: TensorDict = {}
        # Written out, because PyTorch's own recurrent modules are not twice differentiable.
        for layer, gates in enumerate(self.gates):
            joint = torch.cat([signal, state[f"hidden{layer}"]], dim=-1)
            # This order is fixed: `_gates` starts the second quarter, the forget gate, from a higher bias.
            enter, keep, leave, candidate = gates(joint).chunk(4, dim=-1)
            cell = keep.sigmoid() * state[f"cell{layer}"] + enter.sigmoid() * candidate.tanh()
            signal = leave.sigmoid() * cell.tanh()
            new_state[f"hidden{layer}"], new_state[f"cell{layer}"] = signal, cell
        return self.output(signal).squeeze(-1), new_state


class CoordinatewiseMLP(UpdateRule):
    """A network with one hidden layer on the preprocessed gradient and its running averages.

    With `a_k = d_k a_k + (1 - d_k) g` for every decay `d_k`, the update is `V tanh(U phi(g, a_1, a_2, ...) + u) + v`,
    where `phi` preprocesses each of its arguments.

    Cost: per coordinate and step, a matrix product of `hidden * features`; state of one number per coordinate and
    decay.

    Args:
        hidden: size of the hidden layer.
        decays: of the running averages, each in [0, 1); none makes a rule without memory.
        preprocess: `p` of `log_and_sign`; None feeds the numbers as they are.

    Raises:
        ValueError: if a number is out of range.

    References:
        Metz et al. (2019), Understanding and correcting pathologies in the training of learned optimizers (a
        small network per coordinate that sees momenta at several time scales).
    """

    @typed("decays", "preprocess")
    def __init__(
        self, *, hidden: int = 32, decays: Sequence[float] = (0.5, 0.9, 0.99), preprocess: float | None = 10.0
    ) -> None:
        super().__init__()
        _check_size("CoordinatewiseMLP", "hidden", hidden)
        _check_preprocess("CoordinatewiseMLP", preprocess)
        for decay in decays:
            if not 0.0 <= decay < 1.0:
                raise ValueError(
                    f"`decays` of `CoordinatewiseMLP` holds {decay}, outside [0, 1): such an average never forgets, or "
                    "explodes. Use decays like 0.9."
                )
        self.decays = tuple(decays)
        self.preprocess = preprocess
        self.input = nn.Linear((1 + len(self.decays)) * _num_features(preprocess), hidden)
        self.output = nn.Linear(hidden, 1)

    def initial_state(self, like: Tensor) -> TensorDict:
        """Returns zeros, `average{k}` of the parameter's shape for every decay."""
        return {f"average{position}": torch.zeros_like(like) for position in range(len(self.decays))}

    def forward(self, gradient: Tensor, state: TensorDict) -> tuple[Tensor, TensorDict]:
        """Returns the update and the running averages."""
        averages = {
            f"average{position}": decay * state[f"average{position}"] + (1.0 - decay) * gradient
            for position, decay in enumerate(self.decays)
        }
        seen = [_features(value, self.preprocess) for value in (gradient, *averages.values())]
        return self.output(self.input(torch.cat(seen, dim=-1)).tanh()).squeeze(-1), averages


def log_and_sign(gradient: Tensor, p: float = 10.0) -> Tensor:
    """Returns two features per coordinate, the gradient's magnitude on a logarithmic scale and its sign.

        (log|g| / p, sign g)   if |g| >= exp(-p)
        (-1, exp(p) g)         otherwise

    Both are continuous in `g`, and written with clamps that keep every derivative finite, at `g = 0` too. The slopes
    reach `exp(p)`, 22,000 for 10: hypergradients that run through the gradients of the inner loss (those of a
    `LearnedUpdate` without `gradient_is_constant`) grow with them. With 4 to 5 they stay small.

    Args:
        gradient: of any shape.
        p: smaller gradients than `exp(-p)` are told apart linearly.

    Returns:
        Shape `(*gradient.shape, 2)`; the first feature is at least -1, the second in [-1, 1].

    References:
        Andrychowicz et al. (2016), appendix A.
    """
    # Clamped before the logarithm, whose value and derivative at zero are infinite.
    magnitude = gradient.abs().clamp(min=math.exp(-p)).log() / p
    # Reaches 1 exactly where the first feature leaves -1, so one clamp each makes both cases.
    sign = (math.exp(p) * gradient).clamp(min=-1.0, max=1.0)
    return torch.stack([magnitude, sign], dim=-1)


def _gates(inputs: int, hidden: int) -> nn.Linear:
    """Returns the map from `[x, h]` to the input, forget and output gates and the candidate cell, before they bend."""
    gates = nn.Linear(inputs + hidden, 4 * hidden)
    with torch.no_grad():
        # The forget gate's quarter: without it a new cell loses half of its content at every step.
        gates.bias[hidden : 2 * hidden] += 1.0
    return gates


def _features(gradient: Tensor, preprocess: float | None) -> Tensor:
    return gradient.unsqueeze(-1) if preprocess is None else log_and_sign(gradient, preprocess)


def _num_features(preprocess: float | None) -> int:
    return 1 if preprocess is None else 2


def _check_size(owner: str, name: str, value: int) -> None:
    if not is_count(value):
        raise ValueError(
            f"`{name}` of `{owner}` is {value!r}: a network has a whole number of units and layers, at least 1. Pass "
            "such a number."
        )


def _check_preprocess(owner: str, value: float | None) -> None:
    if value is not None and not 0.0 < value <= 80.0:
        raise ValueError(
            f"`preprocess` of `{owner}` is {value}, outside (0, 80]: exp(p) and exp(-p) must be finite in single "
            "precision. 10 is usual; None feeds the gradient as it is."
        )
