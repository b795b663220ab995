"""Differentiation through the inner updates with every inner gradient held constant."""

from __future__ import annotations

from dataclasses import dataclass

from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.reverse_mode.graph import whole_graph
from hypertorch.hypergradients.reverse_mode.sweep import sweep
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Hypergradient):
    """The hypergradient with every gradient of the inner loss held constant, as first-order MAML has it.

    A step `Phi_t(s, hparams) = U(g, s, hparams)`, `g = dL/dw`, is differentiated as the update rule `U` with `g` a
    number. For gradient descent `w_t = w_{t-1} - lr g_t` that is

        df/dw_0 ~ dE/dw_T,   df/dlr ~ - sum_t dE/dw_T g_t

    and the linear parts of a richer rule (weight decay, momentum, a learnt rule's own weights) are kept. There is no
    second derivative. It is exact where the inner loss is linear in the params and free of hyperparameters.

    A hyperparameter of the inner loss acts through `g` alone, so it has no path here and is refused, unless it also
    acts directly or in the initialisation. Running statistics are constants.

    Cost: `num_steps` steps and as many vjps of the update rule alone. Memory: of the graph of `num_steps` updates,
    a few tensors of the size of the params for each step (none for plain gradient descent) and no activations.

    References:
        Finn, Abbeel and Levine (2017), Model-agnostic meta-learning, section 5.2; Nichol, Achiam and Schulman (2018),
        On first-order meta-learning algorithms, section 2; Andrychowicz et al. (2016), section 2 (learnt rules).
    """

    takes = "first"

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the derivative of the outer loss in `variables` at constant inner gradients."""
        # The sweep of `Reverse()`: all that differs is that the inner gradient is a number.
        return sweep(loop, variables, *whole_graph(loop, variables, "constant"))
