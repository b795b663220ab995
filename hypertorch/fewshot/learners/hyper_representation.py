"""Hyper-representation: a shared representation is the outer variable, a linear head per episode the inner one."""

from __future__ import annotations

from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.dynamics import Dynamics
from hypertorch.fewshot.learners.backbone_checks import first_parameter
from hypertorch.fewshot.learners.head_learner import HeadLearner, linear_head
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.fewshot.learners.step_sizes import LearnLR, learnt_step_size
from hypertorch.types import TensorDict


class HyperRepresentation(HeadLearner):
    """Only a linear head is trained in an episode, on features of a representation that is learnt by the outer loop.

    Outer variables: the weights of the representation `h`, and the step size where `learn_lr` says so. Inner
    variables: a linear head per episode, `W (h(x) - m) / r + b`, from zero, trained on the support set for
    `num_steps` steps; `m` is the mean of the support features and `r` their root mean square distance from it. Outer
    loss: that of the query set at the trained head.

    Centring and scaling keep the inner loop stable while the representation changes: gradient descent diverges, with
    no error, where curvature times step size exceeds 2, and features after a ReLU share a large mean that makes the
    head's curvature several times what the task needs. Trained without, a learnt step size drifts into that edge.

    Cost: per episode, one pass and one vjp of the representation; `num_steps` steps of a linear model.

    Args:
        backbone: from inputs to features, shape `(batch, features)`. It is copied.
        way: outputs of the head.
        dynamics: the inner optimiser.
        num_steps: inner steps (unit: steps).
        learn_lr: None, or `per` of the `ht.Hyper` that takes the place of the step size: "one" or "step".
        objective: loss and metrics of support and query; classification by default.

    Raises:
        ValueError: if `way` is below 1, or `learn_lr` does not fit.
        IncompatibleBackendError: if the backbone has a layer whose hypergradient PyTorch would get wrong.

    References:
        Franceschi, Frasconi, Salzo, Grazzi and Pontil (2018), Bilevel programming for hyperparameter optimization and
        meta-learning, section 4 and equation 8.
    """

    @typed("backbone", "dynamics", "num_steps")
    def __init__(
        self,
        backbone: nn.Module,
        *,
        way: int = 5,
        dynamics: Dynamics,
        num_steps: int,
        learn_lr: LearnLR = None,
        objective: Objective | None = None,
    ) -> None:
        if learn_lr not in (None, "one", "step"):
            raise ValueError(
                f"`learn_lr` is {learn_lr!r}, but the head's size is known only with the features: it has one step "
                "size, or one per step. Use None, 'one' or 'step'."
            )
        # For type and device: a step size for each parameter, which would need their shapes, is refused above.
        some = {"some": first_parameter(backbone).detach()}
        dynamics, step_sizes = learnt_step_size(dynamics, learn_lr, some, num_steps)
        super().__init__(
            backbone,
            way=way,
            dynamics=dynamics,
            num_steps=num_steps,
            objective=objective,
            normalise=True,
            own_hparams=step_sizes,
        )

    def first_head(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
        """Returns a head of zeros, `weight` of shape `(way, features)` and `bias` of shape `(way,)`."""
        # From zero, all classes are equally likely at first, and nothing of the head is shared between episodes.
        return {"weight": support.new_zeros(self.way, support.shape[-1]), "bias": support.new_zeros(self.way)}

    def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
        """Returns the head's linear outputs, shape `(batch, way)`."""
        return linear_head(head, features)
