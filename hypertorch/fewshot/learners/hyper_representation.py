"""Hyper-representation: a shared representation is the outer variable, a linear head per episode the inner one."""

from __future__ import annotations

from torch import Tensor

from hypertorch.fewshot.learners.head_learner import HeadLearner, linear_head
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

    Arguments are those of `HeadLearner`.

    References:
        Franceschi, Frasconi, Salzo, Grazzi and Pontil (2018), Bilevel programming for hyperparameter optimization and
        meta-learning, section 4 and equation 8.
    """

    normalises = True

    def first_head(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
        """Returns a head of zeros, `weight` of shape `(way, features)` and `bias` of shape `(way,)`."""
        # From zero, all classes are equally likely at first, and nothing of the head is shared between episodes.
        return {"weight": support.new_zeros(self.way, support.shape[-1]), "bias": support.new_zeros(self.way)}

    def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
        """Returns the head's linear outputs, shape `(batch, way)`."""
        return linear_head(head, features)
